"""Walking the chain without running it: what would be built, and why; and the job of one stage, to run it by hand."""

from typing import Any, NamedTuple

from flows.pipeline import chain
from tasks.artifacts.artifact import Artifact, Step
from tasks.artifacts.store import Store, changes, home
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import look_up
from tasks.stages import report
from tasks.tracking.client import process_tracker


class Planned(NamedTuple):
    """One stage of a plan: ``action`` is reuse, resume or build."""

    stage: str
    key: str  # "" when an input is still to be built
    action: str
    reasons: list[str]


def plan(config: Pipeline) -> list[Planned]:
    """What ``alignflow run`` would do with each stage."""
    tracker = process_tracker()
    planned: list[Planned] = []
    made: dict[str, Artifact] = {}

    def do(stage: Any, **inputs: Artifact) -> Artifact:
        step = stage.step(config, **inputs)
        found = look_up(step, tracker)
        planned.append(_planned(step, found))
        made[step.stage] = found or unbuilt_artifact(step)
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


def unbuilt_artifact(step: Step) -> Artifact:
    return Artifact(
        stage=step.stage,
        key="",
        digest="",
        path="",
        files={},
        seconds=0.0,
        peak_mb=0.0,
        cached=False,
        metrics={},
        warnings=[],
    )
