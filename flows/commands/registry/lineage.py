"""`alignflow lineage`: say what a model was made from, and which models have learnt from some data."""

import argparse
import json
import re
from typing import Any

from flows.preflight import require_tracker
from tasks.system.errors import InputError
from tasks.tracking import registry
from tasks.tracking.client import Tracker

HELP = "Say what a model was made from, or which models learnt from some data."
EXAMPLE = "alignflow lineage --post 123"
DIGEST = re.compile(r"[0-9a-f]{6,64}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow lineage`."""
    parser.add_argument(
        "what",
        metavar="WHAT",
        nargs="?",
        default="",
        help="MODEL, MODEL/VERSION or MODEL@ALIAS; or the first characters of a digest or key of data "
        "(default: the champion)",
    )
    parser.add_argument("--post", metavar="ID", default="", help="the id of a question or answer")
    parser.add_argument("--label", metavar="ID", default="", help="the id of a label that a person gave")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Print a tree. Raises InputError."""
    if sum(map(bool, (args.what, args.post, args.label))) > 1:
        raise InputError("Give a model, a digest, --post or --label, not two of them")
    tracker = require_tracker()
    from flows.display import lineage_trees
    from tasks.promotion import lineage, posts
    from tasks.rounds.label_lineage import trace_labels

    graph = lineage.load_graph(tracker)
    found: Any
    if args.post:
        found = posts.trace_post(tracker, graph, args.post)
        tree = lineage_trees.post_tree(args.post, found)
    elif args.label:
        found = trace_labels(tracker, graph, {args.label})
        tree = lineage_trees.label_tree([args.label], found)
    elif DIGEST.fullmatch(args.what):
        digests = graph.find_digests(args.what)
        if not digests:
            raise InputError(f"No artifact and no raw data has a digest or key that begins with {args.what}")
        found = lineage.find_learners(tracker, graph, digests)
        tree = lineage_trees.learners_tree(found)
    else:
        found = lineage.trace_version(graph, _find_version(tracker, args.what))
        tree = lineage_trees.version_tree(found)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        lineage_trees.print_tree(tree)


def _find_version(tracker: Tracker, what: str) -> registry.ModelVersion:
    """Return the version that MODEL, MODEL/VERSION or MODEL@ALIAS names. Raises InputError."""
    name, separator, wanted = what or registry.find_model(tracker, registry.CHAMPION), "", ""
    for sign in "/@":
        if sign in name:
            name, separator, wanted = name.partition(sign)
    version = registry.find_version(tracker, name, wanted if separator else registry.CHAMPION)
    if version is None:
        what = f"{name}{separator}{wanted}" if separator else f"{name}@{registry.CHAMPION}"
        raise InputError(
            f"There is no model version {what}: `alignflow models` lists them, and `alignflow promote RUN` "
            "registers the policy of a run"
        )
    return version
