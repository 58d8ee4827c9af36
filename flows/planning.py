"""Walking the chain without running it: what would be built, and why; and the job of one stage, to run it by hand."""

from pathlib import Path
from typing import Any, NamedTuple

from flows.pipeline import chain
from tasks import report
from tasks.artifact import Artifact, Step
from tasks.programs.config import InputError, Pipeline
from tasks.stage import look_up, write_job
from tasks.store import Store, changes, home


class Planned(NamedTuple):
    """One stage of a plan: ``action`` is reuse, resume or build."""

    stage: str
    key: str  # "" when an input is still to be built
    action: str
    reasons: list[str]


def plan(config: Pipeline) -> list[Planned]:
    """What ``alignflow run`` would do with each stage."""
    planned: list[Planned] = []
    made: dict[str, Artifact] = {}

    def do(stage: Any, **inputs: Artifact) -> Artifact:
        step = stage.step(config, **inputs)
        found = look_up(step)
        planned.append(_planned(step, found))
        made[step.stage] = found or _unbuilt(step)
        return made[step.stage]

    chain(config, do)
    do(report, **made)
    return planned


def _planned(step: Step, found: Artifact | None) -> Planned:
    store, recipe = Store(home()), step.recipe
    key = recipe.key if all(recipe.inputs.values()) else ""
    if found:
        return Planned(step.stage, key, "reuse", [])
    if key and any(store.partial(key).glob("checkpoints/*")):
        return Planned(step.stage, key, "resume", ["a run was cut off here"])
    before = store.newest(step.stage)
    if before is None:
        return Planned(step.stage, key, "build", ["never built"])
    awaited = sorted(name for name, digest in recipe.inputs.items() if not digest)
    reasons = [reason for reason in changes(recipe, before) if reason.removeprefix("input ") not in awaited]
    if awaited:
        reasons.append(f"if {', '.join(awaited)} {'differs' if len(awaited) == 1 else 'differ'}")
    return Planned(step.stage, key, "build", reasons or ["its stored files were altered"])


def _unbuilt(step: Step) -> Artifact:
    return Artifact(stage=step.stage, key="", digest="", path="", files={}, seconds=0.0, peak_mb=0.0, cached=False, metrics={}, warnings=[])


class _Found(Exception):
    """The walk has come to the stage asked for."""


def prepare_job(config: Pipeline, wanted: str, directory: Path) -> None:
    """Write the job.json of one stage into ``directory``; the stages before it must be in the store. Raises InputError."""
    made: dict[str, Artifact] = {}

    def do(stage: Any, **inputs: Artifact) -> Artifact:
        step = stage.step(config, **inputs)
        if step.stage == wanted:
            directory.mkdir(parents=True, exist_ok=True)
            write_job(directory, step, config.machine)
            raise _Found
        found = look_up(step)
        # what lies beside the path to the wanted stage may be missing
        made[step.stage] = found or _unbuilt(step)
        return made[step.stage]

    try:
        chain(config, _complaining(do, wanted))
        _complaining(do, wanted)(report, **made)
    except _Found:
        return
    raise InputError(f"This profile has no stage {wanted}; it has: {', '.join(made)}, report")


def _complaining(do: Any, wanted: str) -> Any:
    def checked(stage: Any, **inputs: Artifact) -> Artifact:
        missing = [artifact["stage"] for artifact in inputs.values() if not artifact["digest"]]
        if missing and stage.run.name == wanted:
            raise InputError(f"The stage {wanted} takes the result of {', '.join(missing)}, not built yet; `alignflow run` builds it")
        made: Artifact = do(stage, **inputs)
        return made

    return checked
