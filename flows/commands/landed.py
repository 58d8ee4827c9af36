"""`alignflow landed`: tell the Prefect server that a new dump is there, so that retraining starts."""

import argparse
from pathlib import Path

from flows import profiles
from flows.preflight import require_prefect_server
from tasks.system.errors import InputError

HELP = "Tell the Prefect server that a new dump is there: retraining starts."
EXAMPLE = "alignflow landed mine Posts.xml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow landed`."""
    parser.add_argument("profile", metavar="PROFILE", help="the profile whose retraining is deployed")
    parser.add_argument("dump", metavar="FILE", type=Path, help="a dump that the cpu worker can read")


def main(args: argparse.Namespace) -> None:
    """Announce the dump and print which run took it. Raises InputError and ServerFailed."""
    dump = args.dump.absolute()
    if not dump.exists():
        raise InputError(f"There is no file or folder {args.dump}")
    require_prefect_server()
    from flows.data_events import announce_dump

    print(announce_dump(profiles.title(args.profile), dump))
