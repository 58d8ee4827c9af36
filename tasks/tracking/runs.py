"""Track runs in MLflow: one run per pipeline, a child run per stage, artifacts under their keys.

An error of MLflow never ends a run: it is reported once, and the rest of the pipeline goes on untracked, with
its artifacts in the store. A failed upload ends a stage only if another machine must find the artifact in
MLflow.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tasks.artifacts.code_version import program_module
from tasks.artifacts.store import Store, home
from tasks.system.locks import acquire, try_acquire
from tasks.tracking.client import Run, Tracker
from tasks.tracking.logged_models import copy_links
from tasks.tracking.run_notes import describe_pipeline, describe_stage, machine_and_home, pipeline_tags
from tasks.tracking.run_origin import COMMIT, NOTE, origin_tags
from tasks.tracking.saved_views import save_view
from tasks.tracking.tracked_run import DIGEST, KEY, TrackedRun

PARENT = "mlflow.parentRunId"
HOME = "alignflow.home"
FLOW_RUN = "prefect.flow_run_id"
PROFILE = "alignflow.profile"
DAMAGED = "stage.damaged"
INPUTS = "stage.inputs"  # JSON: digest of the artifact by the name of the input
WAITS = "The run waits for people, and goes on from here."  # note of the exception that ends its process
MAX_RUNS = 50  # of one search
MAX_ALL_RUNS = 50_000  # of one search; MLflow's own limit


@contextmanager
def pipeline_run(
    tracker: Tracker,
    name: str,
    settings: dict[str, Any],
    *,
    flow_run_id: str = "",
    profile: str = "",
    source: str = "alignflow",
    note: str = "",
    parent: str | None = None,
) -> Iterator[TrackedRun]:
    """Track a pipeline as a run, which ends FAILED or KILLED if the block raises, and SCHEDULED if it waits.

    A flow run that is retried continues its earlier run. A run without ``profile`` is no run of the pipeline:
    it is never found as one. ``note`` describes it, in place of its settings; ``parent`` is the run that
    MLflow's pages show it below.
    """
    run = TrackedRun(tracker, None)
    with ExitStack() as held:
        if tracker.connect():
            with tracker.turned_off_by_errors():
                _end_killed_runs(tracker)
                save_view(tracker)
                origin = origin_tags(source)
                tags = {
                    FLOW_RUN: flow_run_id,
                    HOME: machine_and_home(),
                    NOTE: note or describe_pipeline(profile or name, settings),
                    **pipeline_tags(settings, origin.get(COMMIT, "")),
                    **origin,
                }
                tags |= {PROFILE: profile} if profile else {}
                tags |= {PARENT: parent} if parent else {}
                run = _earlier_run(tracker, flow_run_id) or TrackedRun(tracker, tracker.start(name, tags))
                lock = _run_lock(str(run.run_id))
                held.enter_context(acquire(lock))
                held.callback(lock.unlink, missing_ok=True)
                if not run.resumed:
                    run.log_params(settings)
        with _ending(run):
            yield run


def _earlier_run(tracker: Tracker, flow_run_id: str) -> TrackedRun | None:
    """Return the reopened run of an earlier attempt of the same flow run; None if there is none."""
    found = tracker.search(f"tags.`{FLOW_RUN}` = '{flow_run_id}'") if flow_run_id else []
    if not found:
        return None
    tracker.reopen(found[0].run_id)
    return TrackedRun(tracker, found[0].run_id, resumed=True, tags=found[0].tags)


def _end_killed_runs(tracker: Tracker) -> None:
    """End this home's runs whose process was killed: a living process holds the lock of its run."""
    condition = f"tags.`{HOME}` = '{machine_and_home()}' AND status = 'RUNNING'"
    for run in tracker.search(condition, limit=MAX_RUNS):
        lock = try_acquire(_run_lock(run.run_id))
        if lock is None:
            continue
        with lock:
            condition = f"tags.`{PARENT}` = '{run.run_id}' AND status = 'RUNNING'"
            for child in tracker.search(condition, limit=MAX_RUNS):
                directory = Store(home()).partial(child.tags.get(KEY, "unknown"))
                TrackedRun(tracker, child.run_id).upload_log(directory, patience=0)
                tracker.end(child.run_id, "KILLED")
            tracker.end(run.run_id, "KILLED")
            _run_lock(run.run_id).unlink(missing_ok=True)


def _run_lock(run_id: str) -> Path:
    return home() / "locks" / f"run-{run_id}.lock"


@contextmanager
def stage_run(
    tracker: Tracker,
    stage: str,
    key: str,
    settings: dict[str, Any],
    *,
    parent: str | None,
    inputs: dict[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """Track a stage that is being built: in the run of an unfinished attempt at the same key, or in a new
    one.

    Without ``parent`` it is not tracked. ``inputs`` are digests by name.
    """
    run = TrackedRun(tracker, None)
    if parent and tracker.connect():
        with tracker.turned_off_by_errors():
            found = tracker.search(f"{_builds(key)} AND status != 'FINISHED'")
            if found:
                left, tags = found[0].run_id, found[0].tags
                run = TrackedRun(tracker, left, stage=stage, parent=parent, resumed=True, tags=tags)
                tracker.reopen(left)
                run.set_tags({PARENT: parent})
            else:
                tags = _stage_tags(stage, key, parent, is_cached=False)
                tags[NOTE] = describe_stage(stage, key, inputs or {})
                tags |= {INPUTS: json.dumps(inputs)} if inputs is not None else {}
                run = TrackedRun(
                    tracker, tracker.start(f"{stage} {key[:6]}", tags), stage=stage, parent=parent
                )
                run.log_params(settings)
    with _ending(run):
        yield run


def log_reuse(
    tracker: Tracker, stage: str, key: str, digest: str, metrics: dict[str, Any], *, parent: str | None
) -> None:
    """Track a stage whose artifact is reused: its metrics and the run that built it, without an upload."""
    if not (parent and tracker.connect()):
        return
    with tracker.turned_off_by_errors():
        tags = _stage_tags(stage, key, parent, is_cached=True)
        tags[DIGEST] = digest
        tags[NOTE] = f"Reused: the artifact {key[:12]} was stored before."
        earlier = tracker.search(_built(key))
        if earlier:
            tags["stage.built_by"] = earlier[0].run_id
            tags[NOTE] += f" [The run that built it]({tracker.page_path(earlier[0].run_id)})"
        run = TrackedRun(tracker, tracker.start(f"{stage} {key[:6]}", tags), stage=stage, parent=parent)
        if earlier:
            copy_links(tracker, earlier[0], str(run.run_id), parent)
        run.log_summary(metrics)
        run.end("FINISHED")


def find_built(tracker: Tracker, key: str) -> list[tuple[str, str]]:
    """Return (run id, digest) of the uploaded artifacts with this key that are not marked damaged, newest
    first.
    """
    if not tracker.connect():
        return []
    return [
        (run.run_id, run.tags[DIGEST]) for run in tracker.search(_built(key), limit=10) if _is_complete(run)
    ]


def finished_stage_runs(tracker: Tracker) -> list[Run]:
    """Return the runs that have built and uploaded an artifact, newest first."""
    found = tracker.search("tags.cached = 'false' AND attributes.status = 'FINISHED'", limit=MAX_ALL_RUNS)
    return [run for run in found if _is_complete(run) and KEY in run.tags and "stage" in run.tags]


def mark_damaged(tracker: Tracker, run_id: str) -> None:
    """Mark the artifact of a run as different from its manifest, so that ``find_built`` leaves it out."""
    tracker.set_tags(run_id, {DAMAGED: "true"})


def _is_complete(run: Run) -> bool:
    return DIGEST in run.tags and DAMAGED not in run.tags


def _builds(key: str) -> str:
    """Return the condition for runs that build the artifact with this key."""
    return f"tags.`{KEY}` = '{key}' AND tags.cached = 'false'"


def _built(key: str) -> str:
    return f"{_builds(key)} AND status = 'FINISHED'"


def _stage_tags(stage: str, key: str, parent: str, *, is_cached: bool) -> dict[str, str]:
    tags = {PARENT: parent, "stage": stage, KEY: key, "cached": str(is_cached).lower()}
    return tags | origin_tags(program_module(stage))


@contextmanager
def _ending(run: TrackedRun) -> Iterator[None]:
    """End the run with the status that the block's end calls for."""
    try:
        yield
    except BaseException as error:
        if WAITS in getattr(error, "__notes__", ()):
            run.end("SCHEDULED")
        elif isinstance(error, Exception):
            run.end("FAILED")
        else:  # Ctrl-C, or Prefect's cancellation
            run.end("KILLED", patience=0)  # a user who presses Ctrl-C must not wait for an unreachable server
        raise
    run.end("FINISHED")
