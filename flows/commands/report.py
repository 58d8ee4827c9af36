"""`alignflow report`: print where the last run's report is, and open it."""

import argparse

from tasks.artifacts.store import home
from tasks.system.errors import InputError

HELP = "Say where the last run's report is."
EXAMPLE = "alignflow report --open"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow report`."""
    parser.add_argument("--open", action="store_true", help="open it in the browser")


def main(args: argparse.Namespace) -> None:
    """Print the path of the report. Raises InputError if there is none."""
    page = home() / "report.html"
    if not page.is_file():
        raise InputError("There is no report yet; `alignflow run demo` makes one")
    print(page)
    if args.open:
        import webbrowser

        webbrowser.open(page.as_uri())
