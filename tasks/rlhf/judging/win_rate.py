"""Estimate win rates, with intervals that take questions as what was sampled."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.evaluation.intervals import Interval, wilson
from tasks.rlhf.judging.resampling import question_numbers
from tasks.rlhf.judging.verdicts import Outcomes

POWER, SIGNIFICANCE = 0.8, 0.05
MANY_QUESTIONS, MANY_OUTCOMES = 100, 40  # from here on the normal interval covers as well as Wilson's
Z = 1.959964


def win_rate(outcomes: Outcomes, questions: NDArray[np.int64]) -> Interval:
    """Return the share of wins, ties as halves, with its 95 % interval; n counts questions.

    outcomes (N,), NaN for verdicts that could not be read, which are left out; questions (N,) ids. Outcomes
    of one question depend on each other, so the variance is that of redrawn questions, of a ratio of sums
    (Cochran 1977, 6.19). The effective number of questions, rate (1 - rate) / variance, is the size of a
    binomial sample with as much of it. With ``MANY_QUESTIONS``, and ``MANY_OUTCOMES`` of these on the rarer
    side, the interval is the normal one; with fewer it is Wilson's of the effective number with Student's
    quantile (Dean and Pagano 2015). Without variance it is Wilson's of the questions; NaN with [0, 1] if
    nothing could be read. tests/benchmarks/coverage.py measures how often it holds the truth.
    """
    known = ~np.isnan(outcomes)
    if not known.any():
        return wilson(0, 0)
    values, numbers = outcomes[known], question_numbers(questions[known])
    sums, counts = np.bincount(numbers, values), np.bincount(numbers)
    n, rate = len(counts), float(values.mean())
    variance = float(((sums - rate * counts) ** 2).sum()) / len(values) ** 2
    if n == 1 or variance < 1e-20:  # rounding leaves about 1e-33 of none
        return _containing(rate, wilson(rate * n, n))
    binomial = rate * (1 - rate)
    if n >= MANY_QUESTIONS and binomial / variance * min(rate, 1 - rate) >= MANY_OUTCOMES:
        half = Z * math.sqrt(variance)
        return Interval(rate, rate - half, rate + half, n)
    # Wilson's ends depend on z^2 / n alone; Student's t asks for the unbiased variance
    inflation = variance * n * n / (n - 1) / binomial  # questions by effective ones
    return _containing(rate, wilson(rate * n, n, z=float(stats.t.ppf(0.975, n - 1)) * math.sqrt(inflation)))


def _containing(rate: float, bounds: Interval) -> Interval:
    """Return an interval with the rate inside: rounding leaves Wilson's end at 1 below 1 by 1e-16."""
    return Interval(rate, min(rate, bounds.low), max(rate, bounds.high), bounds.n)


def questions_needed(rate: float, *, tie_share: float = 0.0) -> int:
    """Return how many questions show with 80 % power that a true win rate differs from one half (at 5 %).

    Normal approximation: the variance of an outcome is rate (1 - rate) - tie_share / 4.
    """
    assert 0.5 < rate <= 1
    assert 0 <= tie_share <= 2 * (1 - rate)
    z_level, z_power = stats.norm.ppf(1 - SIGNIFICANCE / 2), stats.norm.ppf(POWER)
    null = math.sqrt((1 - tie_share) / 4)
    spread = math.sqrt(max(0.0, rate * (1 - rate) - tie_share / 4))
    return int(np.ceil(((z_level * null + z_power * spread) / (rate - 0.5)) ** 2))


def smallest_detectable(num_questions: int, *, tie_share: float = 0.0) -> float | None:
    """Return the smallest win rate above one half that the questions show with 80 % power; None if none."""
    low, high = 0.5, 1 - tie_share / 2
    if high <= 0.5 or questions_needed(high, tie_share=tie_share) > num_questions:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        if questions_needed(middle, tie_share=tie_share) > num_questions:
            low = middle
        else:
            high = middle
    return high
