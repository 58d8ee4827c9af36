"""`alignflow labels`: export, import, withdraw and finish the labels of a round, and measure agreement."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flows.preflight import require_tracker
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker

if TYPE_CHECKING:
    from tasks.rounds.label_log import Label
    from tasks.rounds.label_round import LabelRound

HELP = "Export, import, withdraw or finish the labels of a round, or say how far raters agree."
EXAMPLE = "alignflow labels export rounds labels.jsonl"
ROUND = "a profile (its newest round), or a run of a round by its id in MLflow or name"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow labels`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, function, text in (
        ("export", export_labels, "write the labels with the texts of their pairs, as JSON lines or parquet"),
        ("import", import_labels, "add labels from such a file, or none if a row is bad"),
        ("withdraw", withdraw_labels, "withdraw labels, and name what was built on them"),
        ("finish", finish_labels, "let the round go on with the labels that there are"),
        ("agreement", print_agreement, "say how far raters agree, and who is flagged"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("round", metavar="ROUND", help=ROUND)
        action.set_defaults(action=function)
        if name in ("export", "import"):
            action.add_argument("file", metavar="FILE", type=Path, help="FILE.jsonl or FILE.parquet")
        if name == "withdraw":
            action.add_argument("ids", metavar="ID", nargs="*", help="ids of labels, or their beginnings")
            action.add_argument("--rater", metavar="NAME", default="", help="all labels of this rater")
            action.add_argument("--why", metavar="TEXT", required=True, help="kept with the labels")
            action.add_argument("--by", metavar="NAME", required=True, help="who withdraws them")
        if name == "finish":
            action.add_argument("--by", metavar="NAME", required=True, help="who says so")


def main(args: argparse.Namespace) -> None:
    """Do what is asked. Raises InputError."""
    if path := getattr(args, "file", None):
        args.file = path.absolute()
    tracker = require_tracker()
    from tasks.rounds.label_exchange import fetch_labels
    from tasks.rounds.label_round import find_round

    one = find_round(tracker, args.round)
    args.action(args, tracker, one, fetch_labels(tracker, one))


def export_labels(args: argparse.Namespace, tracker: Tracker, one: "LabelRound", held: "list[Label]") -> None:
    """Write the labels to a file."""
    from tasks.rounds.label_round import read_asked
    from tasks.rounds.label_rows import write_file

    count = write_file(args.file, held, read_asked(tracker, one.key))
    print(f"{count:,} labels of {one.title} are in {args.file}")


def import_labels(args: argparse.Namespace, tracker: Tracker, one: "LabelRound", held: "list[Label]") -> None:
    """Add the labels of a file, and announce it if every pair has one. Raises InputError."""
    from flows.labelling.announcing import announce_labels
    from tasks.rounds.label_exchange import publish_labels
    from tasks.rounds.label_log import add_missing_rows, count_labelled, label_folder
    from tasks.rounds.label_round import read_asked
    from tasks.rounds.label_rows import read_file

    _refuse_frozen(one)
    pairs = read_asked(tracker, one.key)
    added = add_missing_rows(label_folder(one.key), read_file(args.file, pairs))
    publish_labels(tracker, one)
    asked = [str(pair["pair_id"]) for pair in pairs]
    done = count_labelled([*held, *added], asked, with_skipped=True)
    print(f"{len(added):,} labels are added to {one.title}: {done:,} of {len(asked):,} pairs have one")
    if done == len(asked):
        _go_on(one, announce_labels(one.flow_run))


def withdraw_labels(
    args: argparse.Namespace, tracker: Tracker, one: "LabelRound", held: "list[Label]"
) -> None:
    """Withdraw labels, and print what was built on them. Raises InputError."""
    from flows.display import lineage_trees
    from tasks.promotion.lineage import load_graph
    from tasks.rounds.frozen_labels import thaw
    from tasks.rounds.label_exchange import publish_labels
    from tasks.rounds.label_lineage import trace_labels
    from tasks.rounds.label_log import label_folder, withdraw

    chosen = _choose(held, args.ids, args.rater)
    found = trace_labels(tracker, load_graph(tracker), {label.label_id for label in chosen})
    withdraw(label_folder(one.key), chosen, why=args.why, by=args.by)
    publish_labels(tracker, one)
    thaw(tracker, one.key)
    print(f"{len(chosen):,} labels of {one.title} are withdrawn. Built on them:")
    lineage_trees.print_tree(lineage_trees.label_tree([label.label_id for label in chosen], found))
    if one.frozen:
        print("A run of this round that is started again is built without them.")


def _choose(held: "list[Label]", ids: list[str], rater: str) -> "list[Label]":
    """Return the labels of a rater, or those whose ids begin so. Raises InputError."""
    if bool(ids) == bool(rater):
        raise InputError("Give the ids of labels or --rater, and not both")
    if rater:
        found = [label for label in held if label.rater == rater]
        if not found:
            raise InputError(f"The round has no label of a rater {rater!r}")
        return found
    chosen = []
    for name in ids:
        found = [label for label in held if label.label_id.startswith(name)]
        if len(found) != 1:
            raise InputError(f"{len(found):,} labels of the round have an id that begins with {name}")
        chosen += found
    return chosen


def finish_labels(args: argparse.Namespace, tracker: Tracker, one: "LabelRound", held: "list[Label]") -> None:
    """Let the round go on although pairs have no label. Raises InputError."""
    from flows.labelling.announcing import announce_labels
    from tasks.rounds.label_log import SKIP
    from tasks.rounds.label_round import ENOUGH
    from tasks.rounds.label_rows import check_rater

    _refuse_frozen(one)
    decided = {label.pair_id for label in held if label.verdict != SKIP}
    if len(decided) < one.least:
        raise InputError(
            f"{one.title} has labels of {len(decided):,} pairs, and rounds.labels.least is {one.least:,}"
        )
    tracker.set_tags(one.run_ids[0], {ENOUGH: check_rater(args.by)})
    _go_on(one, announce_labels(one.flow_run))


def _go_on(one: "LabelRound", is_announced: bool) -> None:
    how = "its flow run is resumed" if is_announced else "the same `alignflow rounds` goes on with them"
    print(f"The labels of {one.title} are in: {how}.")


def _refuse_frozen(one: "LabelRound") -> None:
    if one.frozen:
        raise InputError(f"{one.title} has gone on with the labels that it had")


def print_agreement(
    args: argparse.Namespace, tracker: Tracker, one: "LabelRound", held: "list[Label]"
) -> None:
    """Print what the stage comparisons has found of raters, once it is built. Raises InputError."""
    from flows.labelling.rater_table import print_raters
    from tasks.promotion.lineage import load_graph
    from tasks.rounds.label_lineage import read_agreement

    del args, held
    found = read_agreement(tracker, load_graph(tracker), one.frozen)
    if found is None:
        raise InputError(f"The comparisons of {one.title} are not built yet, which say how far raters agree")
    print_raters(found)
