"""`alignflow models`: list the registered policies."""

import argparse

from flows.preflight import require_tracker
from tasks.tracking import registry

HELP = "List the registered policies: which is the champion, and what it has shown."
EXAMPLE = "alignflow models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow models`."""
    parser.add_argument("--model", metavar="NAME", default="", help="of this model only")


def main(args: argparse.Namespace) -> None:
    """Print a line for each version, newest first. Raises InputError."""
    versions = registry.list_versions(require_tracker(), args.model)
    if not versions:
        print("No model is registered yet; `alignflow promote` registers the policy of a run.")
        return
    from flows.display.registry_tables import print_versions

    print_versions(versions)
