"""Decide pairs by their labels: which answer of each is better."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.programs.rounds.label_rows import OTHER_SIDE, LabelRow
from tasks.programs.rounds.raters import Rater, describe_raters

SPLIT = "split"  # no verdict is the most common one


class Decided(NamedTuple):
    """The result of a round's labels."""

    comparisons: list[dict[str, Any]]  # rows of the table comparisons
    counts: dict[str, int]  # of pairs by what was decided: a verdict, or "split"
    raters: list[Rater]


def decide(labels: Sequence[LabelRow], asked: Sequence[Mapping[str, Any]], least_right: float) -> Decided:
    """Decide the pairs in ``asked`` that have labels, without the gold questions.

    Gold questions first tell raters who guess (`describe_raters`), whose labels do not count. Of several
    labels of a pair the most common verdict counts, and skipped ones do not. A tie, two bad answers, or no
    verdict that is most common, make no comparison.
    """
    known = {pair["pair_id"]: pair["known"] for pair in asked if pair["known"]}
    labels = last_of_each(labels)
    raters = describe_raters(labels, known, least_right=least_right)
    flagged = {one.name for one in raters if one.flagged}
    by_pair: dict[str, list[LabelRow]] = {}
    for label in labels:
        if label.rater not in flagged:
            by_pair.setdefault(label.pair_id, []).append(label)
    comparisons, counts = [], Counter[str]()
    for pair in asked:
        of_pair = by_pair.get(pair["pair_id"])
        if not of_pair or pair["known"]:
            continue
        verdict = most_common(of_pair)
        counts[verdict] += 1
        if verdict in OTHER_SIDE:
            comparisons.append(_comparison(pair, verdict, of_pair))
    comparisons.sort(key=lambda row: (row["question_id"], row["pair_id"]))
    return Decided(comparisons, dict(counts), raters)


def last_of_each(labels: Sequence[LabelRow]) -> list[LabelRow]:
    """Return the last label that each rater has given to each pair, by time and then by order."""
    found: dict[tuple[str, str], LabelRow] = {}
    for label in sorted(labels, key=lambda one: one.time):
        found[label.pair_id, label.rater] = label
    return list(found.values())


def most_common(labels: Sequence[LabelRow]) -> str:
    """Return the verdict that most labels have, "split" if there are two, "skip" if all were skipped."""
    counts = Counter(one.verdict for one in labels if one.verdict != "skip").most_common()
    if not counts:
        return "skip"
    return SPLIT if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def _comparison(pair: Mapping[str, Any], better: str, labels: Sequence[LabelRow]) -> dict[str, Any]:
    ordered = sorted(labels, key=lambda one: one.label_id)
    return {
        "question_id": pair["question_id"],
        "prompt": pair["prompt"],
        "messages": pair["messages"],
        "chosen": pair[better],
        "rejected": pair[OTHER_SIDE[better]],
        "gap": 1.0,  # a verdict has no points
        "pair_id": pair["pair_id"],
        "origin": labels[0].source,
        "label_ids": [one.label_id for one in ordered],
        "raters": [one.rater for one in ordered],
    }
