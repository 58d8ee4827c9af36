"""`alignflow label`: serve the page on which people say which answer of a pair is better."""

import argparse

from flows.arguments import number
from flows.preflight import require_tracker

HELP = "Serve a page on which people label the pairs of a round, by keyboard."
EXAMPLE = "alignflow label rounds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow label`."""
    parser.add_argument(
        "round",
        metavar="ROUND",
        nargs="?",
        default="",
        help="a profile, or a run of a round by its id in MLflow or name (default: the newest that waits)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; 0.0.0.0 lets others label from their machines (default: %(default)s)",
    )
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8765, help="0: a free one (default: %(default)s)"
    )


def main(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C. Raises InputError."""
    tracker = require_tracker()
    from flows.labelling.server import serve
    from tasks.rounds.label_round import find_round

    one = find_round(tracker, args.round)

    def print_start(address: str) -> None:
        print(f"Label {one.title} at\n  {address}\nCtrl-C ends the page; every label is kept.", flush=True)

    queue = serve(tracker, one, host=args.host, port=args.port, on_start=print_start)
    labels = queue.labels()
    raters = sorted({label.rater for label in labels})
    by = f"{len(labels):,} labels by {', '.join(raters)}" if labels else "No labels"
    print(f"\n{by}; " + ("every pair has one." if queue.is_complete else "some pairs have none yet."))
