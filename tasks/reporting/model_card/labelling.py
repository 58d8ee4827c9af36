"""Describe who compared the answers of each round that a model has learnt from."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tasks.reporting.evaluation.policies import Rate
from tasks.reporting.numbers import format_percent

STAGE = "comparisons"  # of this round; with a number of an earlier one
HUMAN = ("file", "people")  # kinds of labels that have raters


class LabelledRound(NamedTuple):
    """The comparisons of a round."""

    number: int
    labeller: str
    asked: int  # pairs
    pairs: int  # with a better answer: what the reward model learns from
    raters: int | None  # None: no people
    flagged: int  # raters whose labels are left out
    alpha: Rate | None  # Krippendorff's; None: no pair has two labels
    right: Rate | None  # share of the gold questions; None: there were none


def is_earlier(name: str) -> bool:
    """Return whether an input of the report is the artifact of an earlier round."""
    return bool(re.fullmatch(rf"{STAGE}\d+", name))


def collect_rounds(summaries: Mapping[str, Mapping[str, Any]]) -> list[LabelledRound]:
    """Return the rounds by their summaries, of this round and of earlier ones, oldest first."""
    numbers = {int(name.removeprefix(STAGE)): name for name in summaries if is_earlier(name)}
    if STAGE in summaries:
        numbers[max(numbers, default=0) + 1] = STAGE
    return [_describe(number, summaries[numbers[number]]) for number in sorted(numbers)]


def _describe(number: int, summary: Mapping[str, Any]) -> LabelledRound:
    metrics, labeller = summary["metrics"], summary["labeller"]
    return LabelledRound(
        number,
        _title(labeller),
        asked=metrics["comparisons.asked"],
        pairs=metrics["comparisons.pairs"],
        raters=metrics["comparisons.raters"] if labeller["kind"] in HUMAN else None,
        flagged=metrics["comparisons.flagged"],
        alpha=metrics.get("comparisons.alpha"),
        right=metrics.get("comparisons.right_on_gold_questions"),
    )


def _title(labeller: Mapping[str, Any]) -> str:
    match labeller["kind"]:
        case "gold":
            return f"the gold scorer, {format_percent(labeller['noise'])} of its verdicts turned round"
        case "judge":
            return str(labeller["judge"])
        case "file":
            return "a file of labels"
        case _:
            return "people"


def hide_names(texts: Sequence[str], names: Iterable[str]) -> list[str]:
    """Return texts with "rater 1", "rater 2" and so on in place of the raters' names: a card is published."""
    numbers = {name: f"rater {number}" for number, name in enumerate(sorted(names), start=1)}
    longest_first = sorted(numbers, key=len, reverse=True)
    if not longest_first:
        return list(texts)
    any_name = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")
    return [any_name.sub(lambda found: numbers[found[1]], text) for text in texts]
