"""`alignflow plan`: walk the chain without running it; say which stages would be built or reused, and why."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flows import profiles
from flows.arguments import add_profile
from flows.services import environment
from tasks.artifacts.artifact import Artifact, Step
from tasks.artifacts.store import Store, home, list_changes
from tasks.config.pipeline import Pipeline

if TYPE_CHECKING:
    from tasks.stages.stage import Stage

HELP = "Say which stages would be built or reused, and why."
EXAMPLE = "alignflow plan demo --set ppo.steps=20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow plan`."""
    add_profile(parser)


def main(args: argparse.Namespace) -> None:
    """Print the plan of a profile. Raises InputError."""
    from flows.preflight import check_inputs

    config = profiles.load(args.profile, args.set)
    check_inputs(config)
    config = profiles.with_absolute_paths(config, Path.cwd())
    environment.use_running_servers(home())
    environment.prepare_for_reading()
    from flows.display.terminal import print_plan

    print_plan(plan(config, profiles.title(args.profile)))


class Planned(NamedTuple):
    """One stage of a plan: ``action`` is reuse, resume or build."""

    stage: str
    key: str  # "" when an input is still to be built
    action: str
    reasons: list[str]


def plan(config: Pipeline, profile: str, *, fetch: bool = False) -> list[Planned]:
    """Return what ``alignflow run`` would do with each stage.

    ``fetch`` brings the champion's files to this machine, as a run does, which shows whether they are intact.
    """
    from flows.pipeline import chain
    from tasks.execution.run_stage import look_up
    from tasks.promotion.opponents import find_opponents
    from tasks.stages.report import report
    from tasks.tracking.client import process_tracker

    tracker = process_tracker()
    planned: list[Planned] = []
    artifacts: dict[str, Artifact] = {}

    def look(stage: "Stage", **inputs: Artifact) -> Artifact:
        step = stage.step(config, **inputs)
        found = look_up(step, tracker)
        planned.append(_plan_step(step, found))
        artifacts[step.stage] = found or unbuilt_artifact(step)
        return artifacts[step.stage]

    chain(config, look, find_opponents(tracker, config.promotion, profile, fetch=fetch))
    look(report, **artifacts)
    return planned


def _plan_step(step: Step, found: Artifact | None) -> Planned:
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
    reasons = [
        reason for reason in list_changes(recipe, before) if reason.removeprefix("input ") not in awaited
    ]
    if awaited:
        reasons.append(f"if {', '.join(awaited)} {'differs' if len(awaited) == 1 else 'differ'}")
    return Planned(step.stage, key, "build", reasons or ["its stored files were altered"])


def unbuilt_artifact(step: Step) -> Artifact:
    """Return a placeholder for the artifact of a stage that is not built: it has no digest and no files."""
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
