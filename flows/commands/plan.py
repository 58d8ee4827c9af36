"""`alignflow plan`: walk the chain without running it; say which stages would be built or reused, and why."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flows import profiles
from flows.arguments import add_profile
from flows.services import environment
from tasks.artifacts.artifact import Artifact, Step, unbuilt_artifact
from tasks.artifacts.store import Store, home, list_changes
from tasks.config.pipeline import Pipeline

if TYPE_CHECKING:
    from flows.rounds import Walked
    from tasks.stages.stage import Stage
    from tasks.tracking.client import Tracker

HELP = "Say which stages would be built or reused, and why."
EXAMPLE = "alignflow plan demo --set ppo.steps=20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow plan`."""
    add_profile(parser)
    parser.add_argument("--rounds", action="store_true", help="plan `alignflow rounds PROFILE`")


def main(args: argparse.Namespace) -> None:
    """Print the plan of a profile. Raises InputError."""
    from flows.preflight import check_inputs, check_rounds

    config = profiles.load(args.profile, args.set)
    check_inputs(config)
    if args.rounds:
        check_rounds(config)
    config = profiles.with_absolute_paths(config, Path.cwd())
    environment.use_running_servers(home())
    environment.prepare_for_reading()
    from flows.display.terminal import print_plan

    if args.rounds:
        print_plan(*plan_rounds(config, profiles.title(args.profile)))
    else:
        print_plan(plan(config, profiles.title(args.profile)))


class Planned(NamedTuple):
    """One stage of a plan: ``action`` is reuse, resume or build."""

    stage: str
    key: str  # "" when an input is still to be built
    action: str
    reasons: list[str]
    round: int | None = None  # of a plan of rounds


def plan(config: Pipeline, profile: str, *, fetch: bool = False) -> list[Planned]:
    """Return what ``alignflow run`` would do with each stage.

    ``fetch`` brings the champion's files to this machine, as a run does, which shows whether they are intact.
    """
    from flows.pipeline import chain
    from tasks.promotion.opponents import find_opponents
    from tasks.stages.report import report
    from tasks.tracking.client import process_tracker

    tracker = process_tracker()
    planned: list[Planned] = []
    artifacts: dict[str, Artifact] = {}

    def look(stage: "Stage", **inputs: Artifact) -> Artifact:
        line, artifacts[stage.name] = _look_up(stage.step(config, **inputs), tracker)
        planned.append(line)
        return artifacts[stage.name]

    chain(config, look, find_opponents(tracker, config.promotion, profile, fetch=fetch))
    look(report, **artifacts)
    return planned


def plan_rounds(config: Pipeline, profile: str) -> tuple[list[Planned], str]:
    """Return what ``alignflow rounds`` would do with the stages of each round, and a sentence about the next.

    Stages that all rounds have in common are listed with round 0 alone. A round that is not all built is the
    last one of the plan: what the next one takes depends on its verdict.
    """
    from flows.rounds import walk_rounds
    from tasks.tracking.client import process_tracker

    tracker = process_tracker()
    planned: list[Planned] = []
    keys: set[str] = set()

    def look(number: int, config: Pipeline, stage: "Stage", inputs: Mapping[str, Artifact]) -> Artifact:
        line, artifact = _look_up(stage.step(config, **inputs), tracker)
        if not line.key or line.key not in keys:
            planned.append(line._replace(round=number))
        keys.add(line.key)
        return artifact

    return planned, _describe_end(walk_rounds(config, profile, tracker, look), config.rounds.stop)


def _describe_end(walked: "Walked", stop: str) -> str:
    """Say which round follows the last one of a plan."""
    last, after = f"Round {walked.number}", f"Round {walked.number + 1}"
    if walked.is_last:
        return f"{last} is the last" + (f" ({walked.verdict.sentence})." if walked.verdict else ".")
    if walked.number == 0 or stop == "never":
        return f"{after} takes what round {walked.number} builds."
    wanted = "is shown to win" if stop == "not_won" else "is not shown to lose"
    return f"{after} follows if round {walked.number} {wanted}."


def _look_up(step: Step, tracker: "Tracker") -> tuple[Planned, Artifact]:
    from tasks.execution.run_stage import look_up

    found = look_up(step, tracker)
    return _plan_step(step, found), found or unbuilt_artifact(step.stage)


def _plan_step(step: Step, found: Artifact | None) -> Planned:
    store, recipe = Store(home()), step.recipe
    key = recipe.key if all(recipe.inputs.values()) else ""
    if found:
        return Planned(step.stage, key, "reuse", [])
    if key and any(store.partial(key).glob("checkpoints/*")):
        return Planned(step.stage, key, "resume", ["a run was cut off here"])
    manifests = sorted(store.manifests(step.stage), key=lambda one: float(one["created"]), reverse=True)
    if not manifests:
        return Planned(step.stage, key, "build", ["never built"])
    awaited = sorted(name for name, digest in recipe.inputs.items() if not digest)
    # held against the artifact that is most like it, since the newest one may be of another round
    changes = min((list_changes(recipe, before) for before in manifests), key=len)
    reasons = [reason for reason in changes if reason.removeprefix("input ") not in awaited]
    if awaited:
        reasons.append(f"if {', '.join(awaited)} {'differs' if len(awaited) == 1 else 'differ'}")
    return Planned(step.stage, key, "build", reasons or ["its stored files were altered"])
