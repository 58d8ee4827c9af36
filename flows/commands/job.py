"""`alignflow job`: write the job.json of one stage, to run its program by hand."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flows import profiles
from flows.arguments import add_profile
from flows.commands.plan import unbuilt_artifact
from flows.services import environment, isolation
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.code_version import program_module
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError

if TYPE_CHECKING:
    from tasks.stages.stage import Stage

HELP = "Write a stage's job.json, to run its program by hand."
EXAMPLE = "alignflow job demo sft work/"
STAGES = (
    "site, data, pretrain, sft, merge, reward, ppo, reference, dpo, answers, winrate, benchmarks or report"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow job`."""
    add_profile(parser)
    parser.add_argument("stage", metavar="STAGE", help=STAGES)
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="folder to write job.json into; made if needed"
    )


def main(args: argparse.Namespace) -> None:
    """Write the job and print the command that runs it. Raises InputError."""
    # inputs are not checked here: only those that the stage takes need be on this machine
    config = profiles.with_absolute_paths(profiles.load(args.profile, args.set), Path.cwd())
    directory, folder = args.directory.absolute(), Path.cwd()
    environment.prepare_for_reading()
    prepare_job(config, args.stage, directory, profile=profiles.title(args.profile))
    option = " -P" if isolation.hides_a_module(folder, args.stage) else ""
    print(f"python{option} -m {program_module(args.stage)} {args.directory}")


class _Written(Exception):
    """The job is written; the walk along the chain can stop."""


def prepare_job(config: Pipeline, wanted: str, directory: Path, *, profile: str) -> None:
    """Write the job.json of one stage into ``directory``; its inputs must be stored. Raises InputError."""
    from flows.pipeline import chain
    from tasks.execution.run_stage import look_up, write_job
    from tasks.promotion.opponents import find_opponents
    from tasks.stages.report import report
    from tasks.tracking.client import process_tracker

    tracker = process_tracker()
    artifacts: dict[str, Artifact] = {}

    def write(stage: "Stage", **inputs: Artifact) -> Artifact:
        step = stage.step(config, **inputs)
        if step.stage == wanted:
            directory.mkdir(parents=True, exist_ok=True)
            write_job(directory, step, config.machine, tracker)
            raise _Written
        # a stage that the wanted one does not take may be missing
        artifacts[step.stage] = look_up(step, tracker) or unbuilt_artifact(step)
        return artifacts[step.stage]

    try:
        opponents = find_opponents(tracker, config.promotion, profile)
        chain(config, _requiring_inputs(write, wanted), opponents)
        _requiring_inputs(write, wanted)(report, **artifacts)
    except _Written:
        return
    raise InputError(f"This profile has no stage {wanted}; it has: {', '.join(artifacts)}, report")


def _requiring_inputs(write: Callable[..., Artifact], wanted: str) -> Callable[..., Artifact]:
    """Return ``write``, which raises InputError if an artifact that ``wanted`` takes is not built."""

    def checked(stage: "Stage", **inputs: Artifact) -> Artifact:
        missing = [artifact["stage"] for artifact in inputs.values() if not artifact["digest"]]
        if missing and stage.name == wanted:
            raise InputError(
                f"The stage {wanted} takes the result of {', '.join(missing)}, not built yet; `alignflow "
                "run` builds it"
            )
        return write(stage, **inputs)

    return checked
