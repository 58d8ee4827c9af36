"""Define the command-line arguments that several commands share."""

import argparse
from collections.abc import Callable
from typing import Any

from flows import profiles


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Add a profile and the settings that are changed in it."""
    names = ", ".join(profiles.names())
    parser.add_argument("profile", metavar="PROFILE", help=f"one of {names}, or a YAML file")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="change one setting; may be repeated",
    )


def add_deployed_profiles(parser: argparse.ArgumentParser) -> None:
    """Add the profiles that are deployed beside the built-in ones."""
    parser.add_argument(
        "profile", metavar="PROFILE", nargs="*", help="a YAML file to deploy beside the built-in profiles"
    )


def number(read: Callable[[str], Any], least: float, most: float = float("inf")) -> Callable[[str], Any]:
    """Return a reader of numbers between two bounds, for argparse."""

    def number(text: str) -> Any:  # argparse names it in its own message: invalid number value
        value = read(text)
        if not least <= value <= most:
            bounds = f"{least:g} or more" + (f", {most:g} at most" if most < float("inf") else "")
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return number
