"""`alignflow rounds`: let policy and reward model take turns on fresh comparisons, in this process."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.arguments import add_profile
from flows.commands.run import check, run_flow, write_summary
from flows.failures import RunFailed

if TYPE_CHECKING:
    from prefect import Flow

HELP = "Run rounds: sample answers, compare them, train reward model and policy on, judge, and begin again."
EXAMPLE = "alignflow rounds rounds --set rounds.count=2 --summary rounds.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow rounds`."""
    add_profile(parser)
    parser.add_argument(
        "--summary", metavar="FILE", type=Path, help="write the rounds and their figures as JSON"
    )


def main(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then run the flow. Raises InputError and RunFailed."""
    from flows.preflight import check_rounds

    started = time.monotonic()
    checked = check(args, check_rounds)
    from flows.display.rounds_screen import RoundsScreen, print_rounds_end
    from flows.display.terminal import print_end

    def load_flow() -> "Flow[..., Any]":
        from flows.rounds import rounds

        return rounds

    try:
        summary = run_flow(checked, RoundsScreen(), load_flow)
    except RunFailed as error:
        if error.summary:  # of the round in which a stage failed
            print_end(error.summary)
        raise
    summary["seconds"] = round(time.monotonic() - started, 3)
    write_summary(checked, summary)
    print_rounds_end(summary)
