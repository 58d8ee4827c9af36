"""`alignflow rounds`: let policy and reward model take turns on fresh comparisons, in this process."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.arguments import add_profile
from flows.commands.run import run_command

if TYPE_CHECKING:
    from prefect import Flow

    from flows.commands.run import Display

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
    run_command(args, load_flow, load_display, rounds=True)


def load_flow() -> "Flow[..., Any]":
    """Return the flow of `alignflow rounds`."""
    from flows.rounds import rounds

    return rounds


def load_display() -> "Display":
    """Return the screen of `alignflow rounds`, and what prints its summary."""
    from flows.display.rounds_screen import RoundsScreen, print_rounds_end

    return RoundsScreen(), print_rounds_end
