"""Estimate win rates, with intervals that take questions as what was sampled."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.evaluation.intervals import Interval, wilson
from tasks.rlhf.judging.resampling import question_numbers
from tasks.rlhf.judging.verdicts import Outcomes

POWER, SIGNIFICANCE = 0.8, 0.05


def win_rate(outcomes: Outcomes, questions: NDArray[np.int64]) -> Interval:
    """Return the share of wins, ties as halves, with its 95 % interval; n counts questions.

    outcomes (N,), NaN for verdicts that could not be read, which are left out; questions (N,) ids. Outcomes
    of one question depend on each other, so the interval is that of redrawn questions: the variance of a
    ratio of sums over questions (Cochran 1977, eq. 2.46), with Student's t. If all outcomes are equal there
    is no variance to see, and Wilson's interval takes its place. NaN with [0, 1] if nothing could be read.
    """
    known = ~np.isnan(outcomes)
    if not known.any():
        return wilson(0, 0)
    values, numbers = outcomes[known], question_numbers(questions[known])
    sums, counts = np.bincount(numbers, values), np.bincount(numbers)
    n, rate = len(counts), float(values.mean())
    if n == 1 or np.ptp(values) == 0:
        return wilson(rate * n, n)
    spread = ((sums - rate * counts) ** 2).sum() * n / (n - 1) / len(values) ** 2
    half = float(stats.t.ppf(0.975, n - 1)) * math.sqrt(spread)
    return Interval(rate, max(0.0, rate - half), min(1.0, rate + half), n)


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
