"""run_stage: from what a stage takes to its artifact, which is reused when it is there, and otherwise built, here."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tasks import events, tracking
from tasks.artifact import Artifact, Step
from tasks.digests import replace_text
from tasks.launch import Line, Usage, run_program
from tasks.programs.config import InputError, Machine
from tasks.store import Manifest, Recipe, Store, home


class Seat(NamedTuple):
    """Where a pipeline's stages run and are tracked."""

    machine: Machine
    tracked: str | None = None  # the parent run's id in MLflow


Where = Callable[[Step, Path, Seat, Callable[[Line], None], int], Usage]


def here(step: Step, directory: Path, seat: Seat, on_step: Callable[[Line], None], lock: int) -> Usage:
    """Run the stage's program on this machine. Another place to run is another function like this one."""
    return run_program(step.stage, directory, seat.machine, on_step=on_step, keep_open=(lock,))


def run_stage(step: Step, seat: Seat, *, where: Where = here) -> Artifact:
    """The artifact of ``step``: the verified one in the store, else a newly built one."""
    started = time.monotonic()
    store, recipe = Store(home()), step.recipe
    events.tell("start", step.stage, key=recipe.key, shown=step.shown)
    found = None if store.partial(recipe.key).exists() else store.lookup(step.stage, recipe.key)
    if found is None:
        with store.lock(recipe.key, on_wait=lambda: events.tell("wait", step.stage)) as lock:
            found = store.lookup(step.stage, recipe.key)  # built meanwhile by whoever held the lock
            if found is None:
                return _build(store, step, recipe, seat, where, lock)
            store.discard_partial(recipe.key)
    artifact = _artifact(store, found, cached=True, seconds=time.monotonic() - started)
    tracking.reused(step.stage, found, artifact["metrics"], parent=seat.tracked)
    events.tell("reused", step.stage, artifact=artifact)
    _pass_on_warnings(artifact)
    return artifact


def look_up(step: Step) -> Artifact | None:
    """The artifact of ``step`` if it is in the store; nothing is changed."""
    store, recipe = Store(home()), step.recipe
    found = store.lookup(step.stage, recipe.key)
    return _artifact(store, found, cached=True, seconds=0.0) if found else None


def _build(store: Store, step: Step, recipe: Recipe, seat: Seat, where: Where, lock: int) -> Artifact:
    broken = store.quarantine(step.stage, recipe.key)
    if broken:
        events.tell("warning", step.stage, text=f"{step.stage}: its stored files were altered; they are in {broken} now and are made again")
    directory = store.partial(recipe.key)
    if any(directory.glob("checkpoints/*")):
        events.tell("resume", step.stage)
    try:
        with tracking.stage_run(step.stage, recipe.key, recipe.job, parent=seat.tracked) as tracked:

            def on_step(line: Line) -> None:
                tracked.step(line)
                events.tell("step", step.stage, line=line)

            usage = _finished(directory) or where(step, _prepare(directory, step, seat), seat, on_step, lock)
            manifest = store.commit(recipe, seconds=usage.seconds, peak_mb=usage.peak_mb)
            artifact = _artifact(store, manifest, cached=False, seconds=usage.seconds)
            _track(tracked, manifest, artifact, directory)
    except BaseException as error:
        if isinstance(error, InputError) and not any(directory.glob("checkpoints/*")):
            store.discard_partial(recipe.key)
        events.tell("failed", step.stage)
        raise
    store.discard_partial(recipe.key)
    events.tell("built", step.stage, artifact=artifact)
    _pass_on_warnings(artifact)
    return artifact


def _pass_on_warnings(artifact: Artifact) -> None:
    for sentence in artifact["warnings"]:
        events.tell("warning", artifact["stage"], text=f"{artifact['stage']}: {sentence}")


def _prepare(directory: Path, step: Step, seat: Seat) -> Path:
    shutil.rmtree(directory / "artifact", ignore_errors=True)  # a killed program's half-written result; it resumes from checkpoints/ alone
    directory.mkdir(parents=True, exist_ok=True)
    write_job(directory, step, seat.machine)
    return directory


def write_job(directory: Path, step: Step, machine: Machine) -> None:
    """The job.json that a program reads."""
    job = {
        "stage": step.stage,
        "job": step.job.model_dump(mode="json"),
        "inputs": {name: artifact["path"] for name, artifact in step.inputs.items()},
        "machine": machine.model_dump(mode="json"),
    }
    replace_text(directory / "job.json", json.dumps(job, indent=1) + "\n")


def _finished(directory: Path) -> Usage | None:
    """What a program used that ended well but whose artifact was not committed before the pipeline died."""
    if not (directory / "done").exists() or not (directory / "artifact" / "summary.json").exists():
        return None
    seconds = (directory / "done").stat().st_mtime - (directory / "job.json").stat().st_mtime
    return Usage(max(seconds, 0.0), 0.0)


def _track(tracked: tracking.Tracked, manifest: Manifest, artifact: Artifact, directory: Path) -> None:
    path = Path(artifact["path"])
    tracked.flush()
    tracked.summary({**artifact["metrics"], "seconds": artifact["seconds"], "peak_mb": artifact["peak_mb"]})
    tracked.tags({"stage.digest": manifest["digest"]})
    tracked.data_sets(manifest, path)
    tracked.files(path, manifest["key"])
    tracked.files(directory / "log.txt")


def _artifact(store: Store, manifest: Manifest, *, cached: bool, seconds: float) -> Artifact:
    path = store.entry(manifest["stage"], manifest["key"])
    summary = json.loads((path / "summary.json").read_text()) if (path / "summary.json").exists() else {}
    return Artifact(
        stage=manifest["stage"], key=manifest["key"], digest=manifest["digest"], path=str(path),
        seconds=round(seconds, 3), peak_mb=manifest["peak_mb"], cached=cached, metrics=summary.get("metrics", {}),
        warnings=summary.get("warnings", []),
    )  # fmt: skip
