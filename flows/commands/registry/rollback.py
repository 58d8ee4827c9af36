"""`alignflow rollback`: make an earlier champion the champion again."""

import argparse

from flows.preflight import require_tracker
from tasks.tracking import registry
from tasks.tracking.run_origin import user_name

HELP = "Make the champion before this one the champion again."
EXAMPLE = "alignflow rollback --to 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow rollback`."""
    parser.add_argument(
        "--to", metavar="VERSION", default="", help="a version that has been champion (default: the last)"
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        default="",
        help="name of the registered model (default: the one that has a champion)",
    )


def main(args: argparse.Namespace) -> None:
    """Move the alias and print from where to where. Raises InputError."""
    tracker = require_tracker()
    from tasks.promotion.rollback import roll_back

    model = args.model or registry.find_model(tracker, registry.CHAMPION)
    left, restored = roll_back(tracker, model, args.to, by=user_name())
    policy, run = (restored.tags.get(tag, "unknown") for tag in ("policy", "run"))
    print(
        f"The champion of {model} is version {restored.version} again ({policy} of run {run}), "
        f"in place of version {left.version}, which stays registered."
    )
