"""Compare two models on the same documents."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.evaluation.intervals import Interval

Z = 1.959964


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947): documents that one model alone got right."""
    n = only_first + only_second
    return float(stats.binomtest(only_first, n).pvalue) if n else 1.0


def paired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Interval:
    """Return the mean of first - second over documents, (N,) each, with its 95 % interval.

    Student's t; if all values are 0 or 1, Bonett and Price (2012): one document more of each kind that only
    one model got right, so that two models that agree on all documents have no point for an interval. With
    fewer than two documents the interval is infinite.
    """
    assert first.shape == second.shape
    if np.isin(np.concatenate([first, second]), (0, 1)).all() and len(first) > 1:
        return _difference_of_shares(first, second)
    difference = first - second
    n, value = len(difference), float(difference.mean())
    if n < 2:
        return Interval(value, -math.inf, math.inf, n)
    half = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    return Interval(value, value - half, value + half, n)


def _difference_of_shares(first: NDArray[np.float64], second: NDArray[np.float64]) -> Interval:
    only_first, only_second, n = int((first > second).sum()), int((second > first).sum()), len(first)
    centre = (only_first - only_second) / (n + 2)
    half = Z * math.sqrt(max(0.0, (only_first + only_second + 2) / (n + 2) - centre**2) / (n + 2))
    value = (only_first - only_second) / n
    return Interval(value, max(-1.0, centre - half), min(1.0, centre + half), n)
