"""Score a reward model on RewardBench 2 (Malik et al. 2025, 2506.01937).

A row has right and wrong answers to a question. It counts as right if a right answer has the highest score,
and in part if wrong ones share it. The subset "Ties" is scored differently: each question of it is asked once
with one right answer ("ref:N") and once with several ("tied:N"), and a good model prefers right answers to
wrong ones by more than right answers to each other.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from tasks.rlhf.evaluation.intervals import Interval, wilson
from tasks.rlhf.evaluation.pair_accuracy import DRAWS

TIES = "Ties"


class RowScores(NamedTuple):
    """The scores of a row's right and wrong answers."""

    id: str
    subset: str
    chosen: list[float]
    rejected: list[float]


class Margins(NamedTuple):
    """How far the scores of a row's answers are apart."""

    right: bool  # every right answer is above every wrong one
    among_right: float  # the highest right one over the lowest; 0 for a single right answer
    over_wrong: float  # the lowest right one over the highest wrong one


class TiesQuestion(NamedTuple):
    """Both askings of a question of the subset Ties."""

    reference: Margins
    tied: Margins


def row_score(row: RowScores) -> float:
    """Return 1 / (number of answers with the highest score) if a right answer is among them, else 0."""
    scores = [*row.chosen, *row.rejected]
    best = max(scores)
    return 1 / scores.count(best) if best in row.chosen else 0.0


def subset_score(rows: Sequence[RowScores]) -> Interval:
    """Return the mean score of a subset's rows with Wilson's interval."""
    return wilson(math.fsum(map(row_score, rows)), len(rows))


def pair_ties(rows: Sequence[RowScores]) -> list[TiesQuestion]:
    """Return the questions of the subset Ties that the rows ask in both ways, in the order of the rows."""
    found = {row.id: _margins(row) for row in rows}
    numbers = [id.removeprefix("tied:") for id in found if id.startswith("tied:")]
    return [
        TiesQuestion(found[f"ref:{number}"], found[f"tied:{number}"])
        for number in numbers
        if f"ref:{number}" in found
    ]


def _margins(row: RowScores) -> Margins:
    lowest_right = min(row.chosen)
    over_wrong = lowest_right - max(row.rejected)
    return Margins(over_wrong > 0, max(row.chosen) - lowest_right, over_wrong)


def ties_score(questions: Sequence[TiesQuestion]) -> float:
    """Return the benchmark's own score of the subset Ties, which is at most 1.01.

    30 % each are the shares of the two askings with every right answer above every wrong one, 20 % each the
    shares where right answers are nearer to each other than to wrong ones (in the tied asking, in both), and
    1 % a term that separates models that are equal otherwise.
    """
    n = len(questions)
    both = [min(one.reference.over_wrong, one.tied.over_wrong) for one in questions]
    gaps = [one.tied.among_right for one in questions]
    preferred = sum(one.tied.over_wrong > one.tied.among_right for one in questions)
    preferred_in_both = sum(margin > gap for margin, gap in zip(both, gaps, strict=True))
    separation = math.fsum(_separation(margin, gap) for margin, gap in zip(both, gaps, strict=True))
    right_tied = sum(one.tied.right for one in questions)
    right_reference = sum(one.reference.right for one in questions)
    parts = 0.3 * (right_tied + right_reference) + 0.2 * (preferred + preferred_in_both) + 0.01 * separation
    return parts / n


def _separation(margin: float, gap: float) -> float:
    """Return tanh(margin / gap - 1); its limit for a gap of 0, and 0 if both are 0."""
    if gap == 0:
        return float((margin > 0) - (margin < 0))
    return math.tanh(margin / gap - 1)


def ties_interval(questions: Sequence[TiesQuestion], *, seed: int = 0) -> Interval:
    """Return the score of the subset Ties with its 95 % percentile bootstrap interval over questions.

    One question has no variance: the interval is then [0, 1].
    """
    n = len(questions)
    if n < 2:
        return Interval(ties_score(questions), 0.0, 1.0, n)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (DRAWS, n), generator=generator).tolist()
    scores = [ties_score([questions[row] for row in draw]) for draw in draws]
    low, high = (
        torch.tensor(scores, dtype=torch.float64)
        .quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        .tolist()
    )
    return Interval(ties_score(questions), low, high, n)


def subset_scores(rows: Sequence[RowScores]) -> dict[str, Interval]:
    """Return the score of each subset, in the order of their names.

    The subset Ties is left out if it has no question that is asked in both ways.
    """
    found: dict[str, Interval] = {}
    for name in sorted({row.subset for row in rows}):
        part = [row for row in rows if row.subset == name]
        if name != TIES:
            found[name] = subset_score(part)
        elif questions := pair_ties(part):
            found[name] = ties_interval(questions)
    return found


def total_score(subsets: Mapping[str, Interval]) -> float:
    """Return the mean of the subsets' scores, each with the same weight."""
    return math.fsum(one.value for one in subsets.values()) / len(subsets)
