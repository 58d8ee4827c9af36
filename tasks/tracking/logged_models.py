"""Log the models that stages train as MLflow's logged models, linked to the runs that made them.

Such a model's only file, model.json, names artifacts by key: the weights stay where their stage has uploaded
them, and `tasks.tracking.remote_artifacts.locate` fetches them.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from tasks.artifacts.store import Manifest
from tasks.system.files import replace_text
from tasks.tracking import entities
from tasks.tracking.client import Run, Tracker, is_duplicate
from tasks.tracking.tracked_run import DIGEST, KEY, TrackedRun

MODEL_FILE = "model.json"
SCHEMA = 1
KINDS = {"merge": "language-model", "reward": "reward-model", "ppo": "policy", "dpo": "policy"}  # by stage
MODEL = "stage.model"  # tag of a stage's run: the id of its logged model


def log_model(
    tracker: Tracker, run_id: str, name: str, *, kind: str, content: dict[str, Any], tags: dict[str, str]
) -> str:
    """Log a model whose model.json has this content as an output of a run; return its id."""
    with tempfile.TemporaryDirectory() as folder:
        replace_text(Path(folder, MODEL_FILE), json.dumps(content, indent=1) + "\n")
        model = tracker.call(
            lambda client: client.create_logged_model(
                tracker.experiment, name=name, source_run_id=run_id, tags=tags, model_type=kind
            )
        )
        tracker.call(lambda client: client.log_model_artifacts(model.model_id, folder))
    tracker.call(lambda client: client.finalize_logged_model(model.model_id, "READY"))
    add_output(tracker, run_id, model.model_id)
    return str(model.model_id)


def add_output(tracker: Tracker, run_id: str, model_id: str) -> None:
    """Log a model as an output of a run; doing so twice changes nothing."""
    output = entities.model_output(model_id)
    try:
        tracker.call(lambda client: client.log_outputs(run_id, [output]))
    except (
        Exception
    ) as error:  # MLflow inserts it without a look whether it is there, as in a retried pipeline
        if not is_duplicate(error):
            raise


def describe_artifact(run_id: str, manifest: Manifest) -> dict[str, str]:
    """Return what model.json says of an artifact that a run has uploaded."""
    named = {"stage": manifest["stage"], "key": manifest["key"], "digest": manifest["digest"]}
    return named | {"files": f"runs:/{run_id}/{manifest['key']}"}


def log_stage_model(run: TrackedRun, manifest: Manifest) -> None:
    """Log the model that a stage has trained or merged, for its run and for that of its pipeline."""
    stage = manifest["stage"]
    if stage not in KINDS or not run.is_on:
        return
    tracker, run_id = run.tracker, str(run.run_id)
    with tracker.turned_off_by_errors():
        model_id = run.known.get(MODEL) or log_model(
            tracker,
            run_id,
            f"{stage}-{manifest['key'][:6]}",
            kind=KINDS[stage],
            content={
                "schema": SCHEMA,
                "kind": stage,
                "artifacts": {stage: describe_artifact(run_id, manifest)},
            },
            tags={KEY: manifest["key"], DIGEST: manifest["digest"]},
        )
        run.set_tags({MODEL: model_id})
        if run.parent:
            add_output(tracker, run.parent, model_id)


def log_results(tracker: Tracker, key: str, metrics: dict[str, float]) -> None:
    """Log what an evaluation says of a stage's model, for the model and the run that trained it."""
    if not tracker.is_up:
        return
    with tracker.turned_off_by_errors():
        built = f"tags.`{KEY}` = '{key}' AND tags.cached = 'false' AND status = 'FINISHED'"
        for found in tracker.search(built):
            if MODEL in found.tags:
                TrackedRun(tracker, found.run_id).log_metrics(metrics, model=found.tags[MODEL])


def copy_links(tracker: Tracker, built: Run, reused: str, parent: str) -> None:
    """Log the data sets and the model of the run that built an artifact for one that reuses it.

    The model and the original data sets are logged for the pipeline's run too.
    """
    found = tracker.call(lambda client: client.get_run(built.run_id)).inputs
    data_sets = found.dataset_inputs if found else []
    _copy(tracker, reused, data_sets, built.tags.get(MODEL))
    original = [one for one in data_sets if entities.is_original(one.dataset.source)]
    _copy(tracker, parent, original, built.tags.get(MODEL))


def _copy(tracker: Tracker, target: str, data_sets: list[Any], model_id: str | None) -> None:
    if data_sets:
        tracker.insert(lambda client: client.log_inputs(target, datasets=data_sets))
    if model_id:
        add_output(tracker, target, model_id)
