"""`alignflow job`: write the job.json of one stage, to run its program by hand."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flows import profiles
from flows.arguments import add_profile, number
from flows.services import environment, isolation
from tasks.artifacts.artifact import Artifact, unbuilt_artifact
from tasks.artifacts.code_version import program_module
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError

if TYPE_CHECKING:
    from tasks.stages.stage import Stage
    from tasks.tracking.client import Tracker

HELP = "Write a stage's job.json, to run its program by hand."
EXAMPLE = "alignflow job demo sft work/"
STAGES = (
    "site, data, pretrain, sft, merge, reward, ppo, reference, dpo, answers, winrate, benchmarks or report; "
    "of a round also candidates, asked, comparisons or mixture"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow job`."""
    add_profile(parser)
    parser.add_argument("stage", metavar="STAGE", help=STAGES)
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="folder to write job.json into; made if needed"
    )
    parser.add_argument(
        "--round",
        metavar="N",
        type=number(int, 0),
        help="take the stage of round N of `alignflow rounds PROFILE` (0: what comes before the first)",
    )


def main(args: argparse.Namespace) -> None:
    """Write the job and print the command that runs it. Raises InputError."""
    # inputs are not checked here: only those that the stage takes need be on this machine
    config = profiles.with_absolute_paths(profiles.load(args.profile, args.set), Path.cwd())
    directory, folder = args.directory.absolute(), Path.cwd()
    environment.prepare_for_reading()
    title = profiles.title(args.profile)
    if args.round is None:
        prepare_job(config, args.stage, directory, profile=title)
    else:
        prepare_round_job(config, args.stage, directory, profile=title, number=args.round)
    option = " -P" if isolation.hides_a_module(folder, args.stage) else ""
    print(f"python{option} -m {program_module(args.stage)} {args.directory}")


class _Written(Exception):
    """The job is written; the walk along the stages can stop."""


class _Wanted(NamedTuple):
    """The stage whose job is written, where to, and the command that builds what it takes."""

    stage: str
    directory: Path
    command: str


def prepare_job(config: Pipeline, stage: str, directory: Path, *, profile: str) -> None:
    """Write the job.json of one stage into ``directory``; its inputs must be stored. Raises InputError."""
    from flows.pipeline import chain
    from tasks.promotion.opponents import find_opponents
    from tasks.stages.report import report
    from tasks.tracking.client import process_tracker

    tracker, wanted = process_tracker(), _Wanted(stage, directory, "run")
    artifacts: dict[str, Artifact] = {}

    def look(stage: "Stage", **inputs: Artifact) -> Artifact:
        artifacts[stage.name] = _write(config, stage, inputs, wanted, tracker)
        return artifacts[stage.name]

    try:
        chain(config, look, find_opponents(tracker, config.promotion, profile))
        look(report, **artifacts)
    except _Written:
        return
    raise InputError(f"This profile has no stage {stage}; it has: {', '.join(artifacts)}")


def prepare_round_job(config: Pipeline, stage: str, directory: Path, *, profile: str, number: int) -> None:
    """Write the job.json of one stage of a round; all rounds before it must be stored. Raises InputError."""
    from flows.preflight import check_rounds
    from flows.rounds import walk_rounds
    from tasks.tracking.client import process_tracker

    check_rounds(config)
    tracker, wanted = process_tracker(), _Wanted(stage, directory, "rounds")
    names: list[str] = []

    def look(at: int, config: Pipeline, stage: "Stage", inputs: Mapping[str, Artifact]) -> Artifact:
        if at == number:
            names.append(stage.name)
        return _write(config, stage, inputs, wanted if at == number else None, tracker)

    try:
        walked = walk_rounds(config, profile, tracker, look)
    except _Written:
        return
    if names:
        raise InputError(f"Round {number} has no stage {stage}; it has: {', '.join(names)}")
    ends = "is the last one" if walked.is_last else "is not built yet"
    raise InputError(f"There is no round {number}: round {walked.number} {ends}")


def _write(
    config: Pipeline,
    stage: "Stage",
    inputs: Mapping[str, Artifact],
    wanted: _Wanted | None,
    tracker: "Tracker",
) -> Artifact:
    """Write the job if this is the wanted stage; else return its artifact, or a placeholder.

    Raises _Written, and InputError if an artifact that the wanted stage takes is not built.
    """
    from tasks.execution.run_stage import describe_job, look_up, write_job

    if wanted is None or stage.name != wanted.stage:  # one that the wanted one does not take may be missing
        return look_up(stage.step(config, **inputs), tracker) or unbuilt_artifact(stage.name)
    missing = [artifact["stage"] for artifact in inputs.values() if not artifact["digest"]]
    if missing:
        raise InputError(
            f"The stage {stage.name} takes the result of {', '.join(missing)}, not built yet; `alignflow "
            f"{wanted.command}` builds it"
        )
    job = describe_job(stage.step(config, **inputs), config.machine, tracker)
    _check_folder(wanted.directory, job)
    wanted.directory.mkdir(parents=True, exist_ok=True)
    write_job(wanted.directory, job)
    raise _Written


def _check_folder(directory: Path, job: Mapping[str, Any]) -> None:
    """Refuse a folder of anything but this job: its program would go on from another's checkpoint.

    Raises InputError.
    """
    from tasks.execution.foreground import check_new_folder

    try:
        before = json.loads((directory / "job.json").read_text())
    except (OSError, ValueError):
        before = {}
    if any(before.get(name) != job[name] for name in ("stage", "job", "inputs")):
        check_new_folder(directory)
