"""Return the artifact of a stage: reuse the stored one, or build it here or on a worker of a pool."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import Artifact, Step, stage_artifact
from tasks.artifacts.store import Manifest, Recipe, Store, home
from tasks.config.machine import Machine, Pools
from tasks.execution.dispatch import dispatch
from tasks.execution.launch import Usage, run_program
from tasks.execution.metrics_tail import Line
from tasks.execution.sample_table import SampleTable
from tasks.system import events
from tasks.system.errors import (
    DiskFailure,
    InputError,
    InputMissing,
    StageCrashed,
    StageFailed,
    refusing_disk_failures,
)
from tasks.system.files import replace_text
from tasks.tracking import program_log, remote_checkpoints, runs
from tasks.tracking.client import Tracker, process_tracker
from tasks.tracking.data_sets import data_sets_read
from tasks.tracking.logged_models import log_stage_model
from tasks.tracking.remote_artifacts import Published, find_published, locate, publish
from tasks.tracking.run_notes import describe_figures, describe_stage
from tasks.tracking.run_origin import NOTE
from tasks.tracking.tracked_run import LOG, TrackedRun

MAX_CRASHES = 2  # a killed program is started again this often; it resumes from its checkpoint


@dataclass(frozen=True)
class RunContext:
    """Where a pipeline's stages run and are tracked."""

    machine: Machine
    tracked: str | None = None  # the parent run's id in MLflow; None: untracked
    pools: Pools = field(default_factory=Pools)
    shared: bool = False  # whether other machines must find the artifacts in MLflow
    tracker: Tracker = field(default_factory=process_tracker)


def run_stage(step: Step, context: RunContext) -> Artifact:
    """Return the artifact of ``step``: a verified one from the store or MLflow, else a newly built one.

    Raises InputError and StageFailed.
    """
    with refusing_disk_failures(home()):
        return _run_stage(step, context)


def _run_stage(step: Step, context: RunContext) -> Artifact:
    started = time.monotonic()
    store, recipe = Store(home()), step.recipe
    events.tell("start", step.stage, key=recipe.key, shown=step.shown)
    found = None if store.partial(recipe.key).exists() else store.lookup(step.stage, recipe.key)
    if found:
        return _reused(
            stage_artifact(found, _summary(store, found), cached=True, seconds=time.monotonic() - started),
            context,
        )
    pool = getattr(context.pools, step.kind)
    if far := _find_published(context.tracker, recipe.key):
        return _reused(
            stage_artifact(far.manifest, far.summary, cached=True, seconds=time.monotonic() - started),
            context,
        )
    if pool:
        far = _dispatch(step, pool, context)
        artifact = stage_artifact(far.manifest, far.summary, cached=False, seconds=far.manifest["seconds"])
        events.tell("built", step.stage, artifact=artifact)
        _pass_on_warnings(artifact)
        return artifact
    with store.lock(recipe.key, on_wait=lambda: events.tell("wait", step.stage)) as lock:
        found = store.lookup(step.stage, recipe.key)  # built meanwhile by the process that held the lock
        if found is None:
            return _build(store, step, recipe, context, lock)
        store.discard_partial(recipe.key)
    return _reused(
        stage_artifact(found, _summary(store, found), cached=True, seconds=time.monotonic() - started),
        context,
    )


def _dispatch(step: Step, pool: str, context: RunContext) -> Published:
    try:
        return dispatch(step, pool, machine=context.machine, tracker=context.tracker, tracked=context.tracked)
    except Exception:
        events.tell("failed", step.stage)
        raise


def look_up(step: Step, tracker: Tracker) -> Artifact | None:
    """Return the artifact of ``step`` if the store or MLflow has it; change nothing."""
    store, recipe = Store(home()), step.recipe
    if found := store.lookup(step.stage, recipe.key):
        return stage_artifact(found, _summary(store, found), cached=True, seconds=0.0)
    far = _find_published(tracker, recipe.key)
    return stage_artifact(far.manifest, far.summary, cached=True, seconds=0.0) if far else None


def _find_published(tracker: Tracker, key: str) -> Published | None:
    """Return the artifact with this key in MLflow, if that is a server, which other machines use too."""
    if tracker.is_remote:
        with tracker.turned_off_by_errors():
            return find_published(tracker, key)
    return None


def _reused(artifact: Artifact, context: RunContext) -> Artifact:
    stage, key, digest = artifact["stage"], artifact["key"], artifact["digest"]
    if context.shared and find_published(context.tracker, key) is None:
        publish(artifact, context.tracker, parent=context.tracked)
    runs.log_reuse(context.tracker, stage, key, digest, artifact["metrics"], parent=context.tracked)
    events.tell("reused", stage, artifact=artifact)
    _pass_on_warnings(artifact)
    return artifact


def _build(store: Store, step: Step, recipe: Recipe, context: RunContext, lock: int) -> Artifact:
    broken = store.quarantine(step.stage, recipe.key)
    if broken:
        events.tell(
            "warning",
            step.stage,
            text=f"{step.stage}: its stored files were altered; "
            f"they were moved to {broken} and are built again",
        )
    directory = store.partial(recipe.key)
    try:
        with runs.stage_run(
            context.tracker, step.stage, recipe.key, recipe.job, parent=context.tracked, inputs=recipe.origins
        ) as tracked:
            try:
                usage = _finished(directory)
                if usage is None:
                    usage = _run(step, directory, context, tracked, lock)
                else:
                    SampleTable(tracked, directory).upload_new(is_last=True)
            except BaseException as error:
                _report_log(step.stage, directory, tracked, error)
                raise
            manifest = store.commit(recipe, seconds=usage.seconds, peak_mb=usage.peak_mb)
            artifact = stage_artifact(
                manifest, _summary(store, manifest), cached=False, seconds=usage.seconds
            )
            _track(tracked, manifest, artifact, store.entry(step.stage, recipe.key), directory)
            if context.shared and not tracked.is_on:
                raise StageFailed(
                    f"The stage {step.stage} is done, but MLflow is not reachable, where other machines "
                    "would look for it: run it again"
                )
    except BaseException as error:
        if (
            isinstance(error, InputError)
            and not isinstance(error, DiskFailure)
            and not any(directory.glob("checkpoints/*"))
        ):
            store.discard_partial(recipe.key)
        events.tell("failed", step.stage, how="failed" if isinstance(error, Exception) else "interrupted")
        raise
    store.discard_partial(recipe.key)
    events.tell("built", step.stage, artifact=artifact)
    _pass_on_warnings(artifact)
    return artifact


def _run(step: Step, directory: Path, context: RunContext, tracked: TrackedRun, lock: int) -> Usage:
    """Run the stage's program to its end; start a killed one again, from its checkpoint."""

    table = SampleTable(tracked, directory)

    def on_step(line: Line) -> None:
        tracked.log_step(line)
        table.upload_new()
        events.tell("step", step.stage, line=line)

    directory.mkdir(parents=True, exist_ok=True)
    if context.shared and tracked.is_on:
        with context.tracker.turned_off_by_errors():
            remote_checkpoints.restore(tracked, directory)
    for crashes in range(MAX_CRASHES + 1):
        if any(directory.glob("checkpoints/*")):
            events.tell("resume", step.stage)
        places = _prepare(directory, step, context)
        if tracked.is_on and not crashes:
            with context.tracker.turned_off_by_errors():
                tracked.log_data_sets(data_sets_read(step.stage, step.inputs, places))
        try:
            seconds = context.machine.upload_seconds if context.shared else 0
            uploading = remote_checkpoints.uploading_checkpoints(tracked, directory, seconds)
            monitoring = tracked.monitoring_machine(context.machine.system_metrics)
            with uploading, monitoring:
                usage = run_program(
                    step.stage, directory, context.machine, on_step=on_step, keep_open=(lock,)
                )
            table.upload_new(is_last=True)
            return usage
        except StageCrashed as error:
            if crashes == MAX_CRASHES:
                raise
            events.tell("warning", step.stage, text=f"{error} It is started again.")
            events.tell("log", step.stage, lines=program_log.last_lines(directory / LOG))
    raise AssertionError


def _report_log(stage: str, directory: Path, tracked: TrackedRun, error: BaseException) -> None:
    """Upload the log of a program that failed or was stopped, and report its last lines to the flow run's
    log.
    """
    is_stopped = not isinstance(error, Exception)
    tracked.upload_log(directory, patience=0 if is_stopped else None)
    if not isinstance(error, InputError) and (lines := program_log.last_lines(directory / LOG)):
        events.tell("log", stage, lines=lines)


def _pass_on_warnings(artifact: Artifact) -> None:
    for sentence in artifact["warnings"]:
        events.tell("warning", artifact["stage"], text=f"{artifact['stage']}: {sentence}")


def _prepare(directory: Path, step: Step, context: RunContext) -> dict[str, str]:
    # the incomplete result of a killed program, which resumes from checkpoints/ alone
    shutil.rmtree(directory / "artifact", ignore_errors=True)
    job = describe_job(step, context.machine, context.tracker)
    write_job(directory, job)
    return job["inputs"]


def write_job(directory: Path, job: Mapping[str, Any]) -> None:
    """Write the job.json of a program, as ``describe_job`` returns it."""
    replace_text(directory / "job.json", json.dumps(job, indent=1) + "\n")


def describe_job(step: Step, machine: Machine, tracker: Tracker) -> dict[str, Any]:
    """Return the content of a program's job.json; its inputs are brought to this machine.

    Raises InputMissing.
    """
    places, missing = {}, []
    for name, artifact in sorted(step.inputs.items()):  # JSON that went through a server has lost its order
        try:
            places[name] = str(locate(artifact, tracker))
        except InputMissing:
            missing.append(name)
    if missing:
        raise InputMissing(missing)
    return {
        "stage": step.stage,
        "job": step.job.model_dump(mode="json"),
        "inputs": places,
        "machine": machine.model_dump(mode="json"),
    }


def _finished(directory: Path) -> Usage | None:
    """Return the usage of a program that ended before its pipeline was killed; only the commit is missing."""
    if not (directory / "done").exists() or not (directory / "artifact" / "summary.json").exists():
        return None
    seconds = (directory / "done").stat().st_mtime - (directory / "job.json").stat().st_mtime
    return Usage(max(seconds, 0.0), 0.0)


def _track(tracked: TrackedRun, manifest: Manifest, artifact: Artifact, entry: Path, directory: Path) -> None:
    tracked.flush()
    tracked.log_summary(
        {**artifact["metrics"], "seconds": artifact["seconds"], "peak_mb": artifact["peak_mb"]}
    )
    note = describe_stage(
        manifest["stage"],
        manifest["key"],
        manifest["origins"],
        describe_figures(artifact["metrics"], artifact["warnings"]),
    )
    tracked.set_tags({NOTE: note})
    tracked.upload_log(directory)
    tracked.upload_artifact(manifest, entry)
    log_stage_model(tracked, manifest)
    if tracked.is_on and tracked.tracker.is_remote:
        remote_checkpoints.discard(tracked)


def _summary(store: Store, manifest: Manifest) -> dict[str, Any]:
    path = store.entry(manifest["stage"], manifest["key"]) / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return summary
