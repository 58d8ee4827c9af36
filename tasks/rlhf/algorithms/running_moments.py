"""Mean and deviation of all values so far, batch by batch."""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_DEVIATION = 1e-6


class Moments(NamedTuple):
    """Number, mean, and sum of squared distances from the mean, of values."""

    num_values: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """Return the (biased) standard deviation; 1 of fewer than two values, or of equal ones."""
        deviation = (self.squares / self.num_values) ** 0.5 if self.num_values > 1 else 0.0
        return deviation if deviation > SMALLEST_DEVIATION else 1.0


def moments_of(values: Tensor) -> Moments:
    """Return the moments of values (N,), in float64."""
    if not len(values):
        return Moments()
    exact = values.double()
    mean = exact.mean()
    return Moments(len(exact), mean.item(), ((exact - mean) ** 2).sum().item())


def combine(first: Moments, second: Moments) -> Moments:
    """Return the moments of both sets of values together (Chan, Golub and LeVeque 1983, eq. 2.1)."""
    count = first.num_values + second.num_values
    if not count:
        return Moments()
    gap = second.mean - first.mean
    mean = first.mean + gap * second.num_values / count
    squares = first.squares + second.squares + gap**2 * first.num_values * second.num_values / count
    return Moments(count, mean, squares)


def normalise(values: Tensor, moments: Moments) -> Tensor:
    """Return values (N,) shifted and scaled by ``moments``."""
    return ((values.double() - moments.mean) / moments.deviation).to(
        torch.promote_types(values.dtype, torch.float32)
    )
