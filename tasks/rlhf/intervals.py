"""Confidence intervals of shares."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """An estimate, its 95 % interval, and the number of observations."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int, *, z: float = 1.959964) -> Share:
    """Wilson's 95 % score interval (1927) of a share; ``successes`` may count halves (ties). n = 0 gives the interval [0, 1]."""
    assert 0 <= successes <= n
    if n == 0:
        return Share(float("nan"), 0.0, 1.0, 0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Share(share, max(0.0, centre - half), min(1.0, centre + half), n)


def mean_interval(values: Sequence[float], *, z: float = 1.959964) -> Share:
    """Mean with its 95 % interval by the normal approximation (unbiased variance); needs at least one value."""
    n = len(values)
    mean = sum(values) / n
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.inf
    return Share(mean, mean - half, mean + half, n)
