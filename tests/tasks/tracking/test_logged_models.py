"""Test models, data sets and the machine's load in MLflow, through real runs of it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tasks.artifacts.store import SCHEMA, Manifest
from tasks.tracking import databases, entities, logged_models, runs, saved_views
from tasks.tracking.client import Tracker
from tasks.tracking.entities import DataSet
from tasks.tracking.tracked_run import DIGEST, KEY

SOURCES = {"finetune": '{"uri": "file:///f", "stage": "data"}', "answers": '{"stage": "answers"}'}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    databases.lay("mlflow", place / "mlflow.db")
    return place


@pytest.fixture
def tracker(home: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", databases.address(home / "mlflow.db"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    made = Tracker(home, databases.address(home / "mlflow.db"))
    assert made.connect()
    return made


def manifest(stage: str, key: str) -> Manifest:
    return Manifest(
        schema=SCHEMA, stage=stage, key=key, digest="d" * 64, files={}, job={}, inputs={}, origins={},
        sources={}, seconds=0.0, peak_mb=0.0, created=0.0,
    )  # fmt: skip


def read(tracker: Tracker, run_id: str | None) -> Any:
    return tracker._mlflow.get_run(str(run_id))


def models(tracker: Tracker, run_id: str | None) -> list[str]:
    return [output.model_id for output in read(tracker, run_id).outputs.model_outputs]


def names(tracker: Tracker, run_id: str | None) -> set[str]:
    return {found.dataset.name for found in read(tracker, run_id).inputs.dataset_inputs}


def train(tracker: Tracker, stage: str, key: str) -> tuple[str, str]:
    """Track a stage that reads two data sets and trains a model; return its run and that of its pipeline."""
    with (
        runs.pipeline_run(tracker, "one", {}) as parent,
        runs.stage_run(tracker, stage, key, {}, parent=parent.run_id) as run,
    ):
        data_sets = [DataSet(name, "d", "training", source, None, "{}") for name, source in SOURCES.items()]
        run.log_data_sets(data_sets)
        run.set_tags({DIGEST: "d" * 64})
        logged_models.log_stage_model(run, manifest(stage, key))
    assert tracker.is_up
    return str(run.run_id), str(parent.run_id)


def test_a_trained_model_is_an_output_of_its_stage_and_its_pipeline(tracker: Tracker, tmp_path: Path) -> None:
    run_id, parent = train(tracker, "ppo", "a" * 64)
    (model_id,) = models(tracker, run_id)
    assert models(tracker, parent) == [model_id]
    model = tracker._mlflow.get_logged_model(model_id)
    assert (model.name, model.model_type, model.source_run_id) == ("ppo-aaaaaa", "policy", run_id)
    assert model.tags[KEY] == "a" * 64
    content = json.loads(Path(model.artifact_location.removeprefix("file://"), "model.json").read_text())
    assert content["artifacts"]["ppo"]["files"] == f"runs:/{run_id}/{'a' * 64}"
    assert names(tracker, run_id) == {"finetune", "answers"}
    assert names(tracker, parent) == {"finetune"}  # answers are a result of the pipeline itself


def test_a_stage_that_trains_no_model_logs_none(tracker: Tracker) -> None:
    run_id, parent = train(tracker, "answers", "b" * 64)
    assert read(tracker, run_id).outputs is None or models(tracker, run_id) == []
    assert "stage.model" not in read(tracker, run_id).data.tags
    assert names(tracker, parent) == {"finetune"}


def test_a_reused_stage_has_the_data_and_the_model_of_the_one_that_built_it(tracker: Tracker) -> None:
    run_id, _ = train(tracker, "dpo", "c" * 64)
    with runs.pipeline_run(tracker, "two", {}) as parent:
        runs.log_reuse(tracker, "dpo", "c" * 64, "d" * 64, {}, parent=parent.run_id)
    (reused,) = tracker.search(f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert models(tracker, reused.run_id) == models(tracker, parent.run_id) == models(tracker, run_id)
    assert names(tracker, reused.run_id) == {"finetune", "answers"}
    assert names(tracker, parent.run_id) == {"finetune"}
    assert tracker.page_path(run_id) in reused.tags["mlflow.note.content"]


def test_an_evaluation_is_logged_for_the_model_and_the_run_that_trained_it(tracker: Tracker) -> None:
    run_id, _ = train(tracker, "ppo", "e" * 64)
    logged_models.log_results(tracker, "e" * 64, {"eval/policy/kl": 1.5})
    logged_models.log_results(tracker, "f" * 64, {"eval/policy/kl": 9.0})  # never trained
    assert tracker.is_up
    (model_id,) = models(tracker, run_id)
    (metric,) = tracker._mlflow.get_logged_model(model_id).metrics
    assert (metric.key, metric.value, metric.run_id) == ("eval/policy/kl", 1.5, run_id)
    assert read(tracker, run_id).data.metrics["eval/policy/kl"] == 1.5


@pytest.mark.parametrize("is_wanted", [True, False])
def test_the_machines_load_is_logged_unless_it_is_switched_off(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, is_wanted: bool
) -> None:
    monkeypatch.setattr(entities, "SAMPLING_SECONDS", 0.1)
    with (
        runs.pipeline_run(tracker, "three", {}) as parent,
        runs.stage_run(tracker, "sft", f"{is_wanted:d}" * 64, {}, parent=parent.run_id) as run,
        run.monitoring_machine(is_wanted),
    ):
        deadline = time.monotonic() + (60 if is_wanted else 1)
        while time.monotonic() < deadline and not read(tracker, run.run_id).data.metrics:
            time.sleep(0.1)
    assert ("system/cpu_utilization_percentage" in read(tracker, run.run_id).data.metrics) is is_wanted
    assert tracker.is_up


def test_the_view_of_all_runs_is_saved_once(tracker: Tracker) -> None:
    with runs.pipeline_run(tracker, "four", {}):
        pass
    experiment = tracker._mlflow.get_experiment(tracker.experiment)
    view = json.loads(experiment.tags[saved_views.TAG])
    assert view["name"] == saved_views.NAME
    assert view["state"].startswith("deflate;")
    written: list[str] = []
    real = tracker.call

    def call(function: Any, *arguments: Any) -> Any:
        written.extend(name for name in function.__code__.co_names if name.startswith("set_"))
        return real(function, *arguments)

    tracker.call = call  # type: ignore[method-assign]
    saved_views.save_view(tracker)
    assert written == []


def test_a_model_that_is_an_output_already_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(tmp_path, "http://mlflow:5000")

    def refuse(function: object) -> None:
        raise ValueError(reasons.pop())

    reasons = ["no such run", 'duplicate key value violates unique constraint "inputs_pk"']
    monkeypatch.setattr(tracker, "call", refuse)
    logged_models.add_output(tracker, "r", "m-1")
    with pytest.raises(ValueError, match="no such run"):
        logged_models.add_output(tracker, "r", "m-1")
