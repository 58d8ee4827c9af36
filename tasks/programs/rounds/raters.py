"""Describe the raters of a round: gold questions, habits, and how far they agree with each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.programs.rounds.label_rows import OTHER_SIDE, VERDICTS, LabelRow
from tasks.rlhf.evaluation.intervals import Interval, wilson
from tasks.rlhf.judging.agreement import MISSING, alpha_interval
from tasks.rlhf.judging.report_card import kappa_interval

MANY_LABELS = 20  # from which on habits are judged
ONE_SIDE = 0.75  # share of the verdicts for one side from which on a rater is warned of
TOO_FAST = 1.0  # seconds


class Rater(NamedTuple):
    """Labels of one rater."""

    name: str
    verdicts: dict[str, int]
    right: Interval  # share of the gold questions
    flagged: bool  # shown to have too few gold questions right
    left: Interval  # share of the verdicts for one answer that are for the one shown on the left
    seconds: float | None  # median of a label


def describe_raters(
    labels: Sequence[LabelRow], known: Mapping[str, str], *, least_right: float
) -> list[Rater]:
    """Return what the labels say of each rater, by name.

    ``known`` is the better side of each gold question by its pair. A rater is flagged if the whole interval
    of the share of gold questions that were answered right lies below ``least_right``.
    """
    by_rater: dict[str, list[LabelRow]] = {}
    for label in labels:
        by_rater.setdefault(label.rater, []).append(label)
    return [_describe(name, by_rater[name], known, least_right) for name in sorted(by_rater)]


def _describe(name: str, labels: Sequence[LabelRow], known: Mapping[str, str], least_right: float) -> Rater:
    answered = [one for one in labels if one.pair_id in known and one.verdict != "skip"]
    right = wilson(sum(one.verdict == known[one.pair_id] for one in answered), len(answered))
    sided = [one for one in labels if one.verdict in OTHER_SIDE]
    times = [one.seconds for one in labels if one.seconds is not None]
    return Rater(
        name=name,
        verdicts=dict(Counter(one.verdict for one in labels)),
        right=right,
        flagged=right.n > 0 and right.high < least_right,
        left=wilson(sum(one.verdict == one.shown_first for one in sided), len(sided)),
        seconds=median(times) if times else None,
    )


def warnings_of(raters: Sequence[Rater]) -> list[str]:
    """Return sentences about raters who are flagged, favour one side, or are too fast to have read."""
    found = []
    for one in raters:
        if one.flagged:
            found.append(
                f"The labels of {one.name} are left out: of {one.right.n} gold questions "
                f"{one.right.value:.0%} were answered right."
            )
        share = max(one.left.value, 1 - one.left.value)
        if one.left.n >= MANY_LABELS and share > ONE_SIDE and not one.left.low <= 0.5 <= one.left.high:
            side = "left" if one.left.value > 0.5 else "right"
            found.append(
                f"{one.name} prefers the answer on the {side} in {share:.0%} of {one.left.n} labels."
            )
        if one.seconds is not None and sum(one.verdicts.values()) >= MANY_LABELS and one.seconds < TOO_FAST:
            found.append(f"{one.name} takes {one.seconds:.1f} s for a label (median): too short to read.")
    return found


def right_on_gold_questions(raters: Sequence[Rater]) -> Interval:
    """Return the share of the gold questions that all raters together have answered right."""
    return wilson(
        sum(round(one.right.value * one.right.n) for one in raters if one.right.n),
        sum(one.right.n for one in raters),
    )


def code_labels(labels: Sequence[LabelRow]) -> NDArray[np.int64]:
    """Return the verdicts as numbers (R, N) of R raters on N pairs, both in the order of their names.

    A skipped pair is a missing label.
    """
    raters = {name: number for number, name in enumerate(sorted({one.rater for one in labels}))}
    pairs = {name: number for number, name in enumerate(sorted({one.pair_id for one in labels}))}
    codes = np.full((len(raters), len(pairs)), MISSING)
    for one in labels:
        code = MISSING if one.verdict == "skip" else VERDICTS.index(one.verdict)
        codes[raters[one.rater], pairs[one.pair_id]] = code
    return codes


def measure_agreement(labels: Sequence[LabelRow]) -> dict[str, Interval]:
    """Return alpha over all raters, and kappa of the two who have labelled most pairs in common.

    What no pair with two labels defines is left out.
    """
    codes = code_labels(labels)
    alpha = alpha_interval(codes)
    found = {"alpha": alpha} if alpha.n else {}
    both = [(codes[a] != MISSING) & (codes[b] != MISSING) for a, b in combinations(range(len(codes)), 2)]
    if both and max(common.sum() for common in both):
        best = int(np.argmax([common.sum() for common in both]))
        one, other = [*combinations(range(len(codes)), 2)][best]
        rows = both[best]
        found["kappa"] = kappa_interval(codes[one][rows], codes[other][rows], np.flatnonzero(rows))
    return found


def as_json(raters: Sequence[Rater], agreement: Mapping[str, Interval]) -> dict[str, Any]:
    """Return the content of agreement.json."""
    described = [one._asdict() | {"right": one.right._asdict(), "left": one.left._asdict()} for one in raters]
    return {"raters": described} | {name: value._asdict() for name, value in agreement.items()}
