"""Grade a judge: how far its verdicts agree with votes, and what else could explain them."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.resampling import percentiles, question_numbers, redraw
from tasks.rlhf.judging.verdicts import Outcomes
from tasks.rlhf.judging.win_rate import win_rate

EQUAL_LENGTH = 0.1  # lengths that differ by at most this share of the longer one count as equal


class ReportCard(NamedTuple):
    """How a judge decided pairs of answers that voters have ordered. Intervals redraw questions."""

    agreement: Interval  # share of the voters' orders, ties as halves; n counts questions
    kappa: Interval  # Cohen's kappa of both orders' verdicts with the votes
    equal_length: Interval  # agreement on pairs of about equal length; NaN if there is none
    longer_wins: Interval  # agreement of the rule "the longer answer wins" on the same pairs
    length_pull: Interval  # Spearman's rank correlation of the verdict with the difference in length
    consistency: Interval  # share of pairs whose verdict does not change with the order
    unparseable: float  # share of pairs with a verdict that could not be read
    right_if_first: Interval  # share right when the better answer is shown first ("A")
    right_if_second: Interval  # and when it is shown second


def cohens_kappa(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Cohen's kappa (1960) of two raters' counts, (..., K, K) -> (...); NaN if both are constant."""
    total = tables.sum(axis=(-2, -1))
    observed = np.trace(tables, axis1=-2, axis2=-1) / total
    expected = (tables.sum(axis=-2) * tables.sum(axis=-1)).sum(axis=-1) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa: NDArray[np.float64] = np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)
    return kappa


def kappa_interval(
    first: NDArray[np.int64], second: NDArray[np.int64], questions: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """Return Cohen's kappa of two raters' labels (N,), 0 to K-1, with its interval by redrawing questions."""
    size = int(max(first.max(), second.max())) + 1
    numbers = question_numbers(questions)
    tables: NDArray[Any] = np.zeros((int(numbers.max()) + 1, size, size))
    np.add.at(tables, (numbers, first, second), 1)
    value = float(cohens_kappa(tables.sum(axis=0)))
    draws = cohens_kappa(redraw(tables, seed=seed))
    if np.isnan(draws).all():
        return Interval(value, -1.0, 1.0, len(tables))
    return Interval(value, *percentiles(draws), len(tables))


def rank_correlation(
    first: NDArray[np.float64], second: NDArray[np.float64], questions: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """Return Spearman's rank correlation of two columns (N,), with its interval by redrawing questions.

    Ranks are those of all rows; NaN with [-1, 1] if a column is constant.
    """
    numbers = question_numbers(questions)
    n = int(numbers.max()) + 1
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return Interval(float("nan"), -1.0, 1.0, n)
    ranks = [stats.rankdata(column) for column in (first, second)]
    a, b = (rank - rank.mean() for rank in ranks)
    columns = (np.ones(len(a)), a, b, a * a, b * b, a * b)
    sums = np.stack([np.bincount(numbers, column) for column in columns], axis=1).astype(np.float64)  # (Q, 6)

    def correlations(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        sum_a, sum_b, aa, bb, ab = (totals[:, 1:] / totals[:, :1]).T
        with np.errstate(invalid="ignore", divide="ignore"):
            found: NDArray[np.float64] = (ab - sum_a * sum_b) / np.sqrt((aa - sum_a**2) * (bb - sum_b**2))
        return found

    value = float(correlations(sums.sum(axis=0, keepdims=True))[0])
    return Interval(value, *percentiles(correlations(redraw(sums, seed=seed))), n)


def grade_judge(
    forward: Outcomes,
    backward: Outcomes,
    lengths: NDArray[np.float64],
    questions: NDArray[np.int64],
    *,
    seed: int = 0,
) -> ReportCard:
    """Return a judge's report card on pairs whose better answer is known from votes.

    forward (N,): outcome of the better answer when it was shown first, 1, 0.5, 0 or NaN; backward (N,): when
    it was shown second. lengths (N, 2): characters of the better and the worse answer. questions (N,): ids.
    """
    read = ~(np.isnan(forward) | np.isnan(backward))
    both = np.where(read, (forward + backward) / 2, np.nan)
    longer = (np.sign(lengths[:, 0] - lengths[:, 1]) + 1) / 2
    nearly_equal = np.abs(lengths[:, 0] - lengths[:, 1]) <= EQUAL_LENGTH * lengths.max(axis=1)
    difference = lengths[:, 0] - lengths[:, 1]
    same = np.where(read, (forward == backward).astype(float), np.nan)
    return ReportCard(
        agreement=win_rate(both, questions),
        kappa=_kappa(forward[read], backward[read], questions[read], seed=seed),
        equal_length=win_rate(np.where(nearly_equal, both, np.nan), questions),
        longer_wins=win_rate(longer, questions),
        length_pull=_pull(both[read], difference[read], questions[read], seed=seed),
        consistency=win_rate(same, questions),
        unparseable=float(1 - read.mean()),
        right_if_first=win_rate(forward, questions),
        right_if_second=win_rate(backward, questions),
    )


def _kappa(forward: Outcomes, backward: Outcomes, questions: NDArray[np.int64], *, seed: int) -> Interval:
    """Return kappa over both orders: votes say "first" in one and "second" in the other, never "tie"."""
    if not len(forward):
        return Interval(float("nan"), -1.0, 1.0, 0)
    shown = np.concatenate([forward, 1 - backward])  # 1: the judge prefers the answer that is shown first
    judged = (2 - 2 * shown).astype(np.int64)  # first 0, tie 1, second 2
    votes = np.repeat(np.array([0, 2]), len(forward))
    return kappa_interval(votes, judged, np.concatenate([questions, questions]), seed=seed)


def _pull(
    outcomes: Outcomes, difference: NDArray[np.float64], questions: NDArray[np.int64], *, seed: int
) -> Interval:
    """Return how the verdict follows the length, over both orientations of each pair: votes drop out."""
    if not len(outcomes):
        return Interval(float("nan"), -1.0, 1.0, 0)
    verdicts = np.concatenate([outcomes, 1 - outcomes])
    lengths = np.concatenate([difference, -difference])
    return rank_correlation(verdicts, lengths, np.concatenate([questions, questions]), seed=seed)


def is_better_than_length(card: ReportCard) -> bool:
    """Return whether the judge agrees with the votes more than chance and than "the longer answer wins" do.

    Both must be shown: by its interval against one half, and against the rule's rate.
    """
    return card.agreement.low > 0.5 and card.agreement.low > card.longer_wins.value
