"""Confidence intervals of shares, means and correlations of independent observations."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Interval(NamedTuple):
    """An estimate, its 95 % interval, and the number of observations."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: float, n: int, *, z: float = 1.959964) -> Interval:
    """Wilson's 95 % score interval (1927) of a share; ``successes`` may count halves (ties). n = 0 gives the interval [0, 1]."""
    assert 0 <= successes <= n
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def mean_interval(values: Sequence[float], *, z: float = 1.959964) -> Interval:
    """Mean with its 95 % interval by the normal approximation (unbiased variance); needs at least one value."""
    n = len(values)
    mean = sum(values) / n
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)


def pearson(first: Tensor, second: Tensor, *, z: float = 1.959964) -> Interval:
    """Correlation of two columns with its 95 % interval by Fisher's z (1921). (N,), (N,). NaN within [-1, 1] where one is constant."""
    assert first.shape == second.shape
    a, b = first.double() - first.double().mean(), second.double() - second.double().mean()
    n, rho = len(a), (a @ b / (a.norm() * b.norm())).clamp(-1, 1).item()
    if n <= 3 or math.isnan(rho):
        return Interval(rho, -1.0, 1.0, n)
    if abs(rho) > 1 - 1e-12:  # z is infinite
        return Interval(rho, rho, rho, n)
    half = z / math.sqrt(n - 3)
    return Interval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half), n)
