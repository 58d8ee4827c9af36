"""run_stage: from what a stage takes to its artifact, which is reused when it is there, and otherwise built, here or by a pool's worker."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from tasks.artifacts.artifact import Artifact, Step, stage_artifact
from tasks.artifacts.store import Manifest, Recipe, Store, home
from tasks.config.machine import Machine, Pools
from tasks.execution.dask import spreading
from tasks.execution.dispatch import dispatch
from tasks.execution.launch import Line, Usage, run_program
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
from tasks.tracking import client, program_log, remote_checkpoints, runs
from tasks.tracking.remote_artifacts import Published, locate, publish, published

CRASHES = 2  # how often a program that was killed is started again; it goes on from its checkpoint


class RunContext(NamedTuple):
    """Where a pipeline's stages run and are tracked."""

    machine: Machine
    tracked: str | None = None  # the parent run's id in MLflow
    pools: Pools = Pools()
    shared: bool = False  # whether other machines have to find the artifacts in MLflow


def run_stage(step: Step, seat: RunContext) -> Artifact:
    """The artifact of ``step``: the verified one in the store or in MLflow, else a newly built one. Raises InputError and StageFailed."""
    with refusing_disk_failures(home()):
        return _run_stage(step, seat)


def _run_stage(step: Step, seat: RunContext) -> Artifact:
    started = time.monotonic()
    store, recipe = Store(home()), step.recipe
    events.tell("start", step.stage, key=recipe.key, shown=step.shown)
    found = None if store.partial(recipe.key).exists() else store.lookup(step.stage, recipe.key)
    if found:
        return _reused(
            stage_artifact(found, _summary(store, found), cached=True, seconds=time.monotonic() - started),
            seat,
        )
    pool = getattr(seat.pools, step.kind)
    if far := _published(recipe.key):
        return _reused(
            stage_artifact(far.manifest, far.summary, cached=True, seconds=time.monotonic() - started), seat
        )
    if pool:
        far = _dispatch(step, pool, seat)
        artifact = stage_artifact(far.manifest, far.summary, cached=False, seconds=far.manifest["seconds"])
        events.tell("built", step.stage, artifact=artifact)
        _pass_on_warnings(artifact)
        return artifact
    with store.lock(recipe.key, on_wait=lambda: events.tell("wait", step.stage)) as lock:
        found = store.lookup(step.stage, recipe.key)  # built meanwhile by whoever held the lock
        if found is None:
            return _build(store, step, recipe, seat, lock)
        store.discard_partial(recipe.key)
    return _reused(
        stage_artifact(found, _summary(store, found), cached=True, seconds=time.monotonic() - started), seat
    )


def _dispatch(step: Step, pool: str, seat: RunContext) -> Published:
    try:
        return dispatch(step, pool, machine=seat.machine, tracked=seat.tracked)
    except Exception:
        events.tell("failed", step.stage)
        raise


def look_up(step: Step) -> Artifact | None:
    """The artifact of ``step`` if it is in the store or in MLflow; nothing is changed."""
    store, recipe = Store(home()), step.recipe
    if found := store.lookup(step.stage, recipe.key):
        return stage_artifact(found, _summary(store, found), cached=True, seconds=0.0)
    far = _published(recipe.key)
    return stage_artifact(far.manifest, far.summary, cached=True, seconds=0.0) if far else None


def _published(key: str) -> Published | None:
    """What MLflow has under the key, where it is a server that others use too."""
    if client.is_remote():
        with client.forgiving():
            return published(key)
    return None


def _reused(artifact: Artifact, seat: RunContext) -> Artifact:
    if seat.shared and published(artifact["key"]) is None:
        publish(artifact, parent=seat.tracked)
    runs.reused(
        artifact["stage"], artifact["key"], artifact["digest"], artifact["metrics"], parent=seat.tracked
    )
    events.tell("reused", artifact["stage"], artifact=artifact)
    _pass_on_warnings(artifact)
    return artifact


def _build(store: Store, step: Step, recipe: Recipe, seat: RunContext, lock: int) -> Artifact:
    broken = store.quarantine(step.stage, recipe.key)
    if broken:
        events.tell(
            "warning",
            step.stage,
            text=f"{step.stage}: its stored files were altered; they are in {broken} now and are made again",
        )
    directory = store.partial(recipe.key)
    try:
        with runs.stage_run(
            step.stage, recipe.key, recipe.job, parent=seat.tracked, takes=recipe.origins
        ) as tracked:
            try:
                usage = _finished(directory) or _run(step, directory, seat, tracked, lock)
            except BaseException as error:
                _tell_log(step.stage, directory, tracked, error)
                raise
            manifest = store.commit(recipe, seconds=usage.seconds, peak_mb=usage.peak_mb)
            artifact = stage_artifact(
                manifest, _summary(store, manifest), cached=False, seconds=usage.seconds
            )
            _track(tracked, manifest, artifact, store.entry(step.stage, recipe.key), directory)
            if seat.shared and not tracked.is_on:
                raise StageFailed(
                    f"The stage {step.stage} is done, but MLflow is not reachable, where other machines would look for it: run it again"
                )
    except BaseException as error:
        if (
            isinstance(error, InputError)
            and not isinstance(error, DiskFailure)
            and not any(directory.glob("checkpoints/*"))
        ):
            store.discard_partial(recipe.key)
        events.tell("failed", step.stage)
        raise
    store.discard_partial(recipe.key)
    events.tell("built", step.stage, artifact=artifact)
    _pass_on_warnings(artifact)
    return artifact


def _run(step: Step, directory: Path, seat: RunContext, tracked: runs.Tracked, lock: int) -> Usage:
    """Run the stage's program to its end; one that was killed goes on from its checkpoint."""

    def on_step(line: Line) -> None:
        tracked.step(line)
        events.tell("step", step.stage, line=line)

    directory.mkdir(parents=True, exist_ok=True)
    if seat.shared and tracked.is_on:
        with client.forgiving():
            remote_checkpoints.restore(tracked, directory)
    for crashes in range(CRASHES + 1):
        if any(directory.glob("checkpoints/*")):
            events.tell("resume", step.stage)
        _prepare(directory, step, seat)
        try:
            uploading = remote_checkpoints.mirroring(
                tracked, directory, seat.machine.upload_seconds if seat.shared else 0
            )
            with uploading, spreading(step.stage, directory, seat.machine) as look:
                return run_program(
                    step.stage, directory, seat.machine, on_step=on_step, on_poll=look, keep_open=(lock,)
                )
        except StageCrashed as error:
            if crashes == CRASHES:
                raise
            events.tell("warning", step.stage, text=f"{error} It is started again.")
            events.tell("log", step.stage, lines=program_log.last_lines(directory / "log.txt"))
    raise AssertionError


def _tell_log(stage: str, directory: Path, tracked: runs.Tracked, error: BaseException) -> None:
    """Keep the log of a program that has failed, or was stopped, where its user looks: in MLflow, and its end in the flow run's log."""
    is_stopped = not isinstance(error, Exception)
    tracked.log(directory, patience=0 if is_stopped else None)
    if not isinstance(error, InputError) and (lines := program_log.last_lines(directory / "log.txt")):
        events.tell("log", stage, lines=lines)


def _pass_on_warnings(artifact: Artifact) -> None:
    for sentence in artifact["warnings"]:
        events.tell("warning", artifact["stage"], text=f"{artifact['stage']}: {sentence}")


def _prepare(directory: Path, step: Step, seat: RunContext) -> None:
    shutil.rmtree(
        directory / "artifact", ignore_errors=True
    )  # a killed program's half-written result; it resumes from checkpoints/ alone
    write_job(directory, step, seat.machine)


def write_job(directory: Path, step: Step, machine: Machine) -> None:
    """The job.json that a program reads, with its inputs where they lie on this machine. Raises InputMissing."""
    places, missing = {}, []
    for name, artifact in sorted(
        step.inputs.items()
    ):  # a server's JSON keeps no order, and a program may see one
        try:
            places[name] = str(locate(artifact))
        except InputMissing:
            missing.append(name)
    if missing:
        raise InputMissing(missing)
    job = {
        "stage": step.stage,
        "job": step.job.model_dump(mode="json"),
        "inputs": places,
        "machine": machine.model_dump(mode="json"),
    }
    replace_text(directory / "job.json", json.dumps(job, indent=1) + "\n")


def _finished(directory: Path) -> Usage | None:
    """What a program used that ended well but whose artifact was not committed before the pipeline died."""
    if not (directory / "done").exists() or not (directory / "artifact" / "summary.json").exists():
        return None
    seconds = (directory / "done").stat().st_mtime - (directory / "job.json").stat().st_mtime
    return Usage(max(seconds, 0.0), 0.0)


def _track(
    tracked: runs.Tracked, manifest: Manifest, artifact: Artifact, entry: Path, directory: Path
) -> None:
    tracked.flush()
    tracked.summary({**artifact["metrics"], "seconds": artifact["seconds"], "peak_mb": artifact["peak_mb"]})
    tracked.log(directory)
    tracked.artifact(manifest, entry)
    if tracked.is_on and client.is_remote():
        remote_checkpoints.discard(tracked)


def _summary(store: Store, manifest: Manifest) -> dict[str, Any]:
    path = store.entry(manifest["stage"], manifest["key"]) / "summary.json"
    summary: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return summary
