"""Compare two models on the same documents."""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.evaluation.intervals import Interval


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p of McNemar's test (1947): documents that one model alone got right."""
    n = only_first + only_second
    return float(stats.binomtest(only_first, n).pvalue) if n else 1.0


def paired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Interval:
    """Return the mean of first - second over documents, (N,) each, with its 95 % interval (Student's t).

    With fewer than two documents the interval is infinite.
    """
    assert first.shape == second.shape
    difference = first - second
    n, value = len(difference), float(difference.mean())
    if n < 2:
        return Interval(value, -math.inf, math.inf, n)
    half = float(stats.t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n))
    return Interval(value, value - half, value + half, n)
