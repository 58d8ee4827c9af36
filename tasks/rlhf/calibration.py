"""Whether a reward model's pair probabilities p = sigmoid((r_w - r_l) / T) mean what they say, and the temperature T that makes them.

A margin is r_w - r_l: the chosen answer's reward minus the rejected one's, in reward units, so a model that is right has positive margins. Fit T on
other pairs than those that the calibration error is told of: on its own pairs T is a little too good.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.intervals import Share, wilson

WIDEST = 100.0  # T lies between a hundredth and a hundred times the mean |margin|
HALVINGS = 60  # of the interval of log T: to the last digits of a float64


def fit_temperature(margins: Tensor) -> float:
    """T > 0 with the least mean -log sigmoid(margin / T) (Guo et al. 2017, section 4.2, for two classes). margins (P,), P >= 1.

    The loss is convex in b = 1/T: its slope only rises, and where it crosses 0 is found by halving, which no start and no curvature can mislead.

    Two kinds of margins have no best T, and get a bound. Where no margin is negative, b grows for ever: T is mean |margin| / WIDEST, and a usual pair
    is certain. Where the model is no better than chance (mean margin <= 0), b is 0 or below: T is WIDEST * mean |margin|, and every p about 1/2.
    The bounds go with the margins, so margins times c always give T times c. Margins that are all 0 give T = 1.
    """
    margins = _checked(margins)
    scale = margins.abs().mean().item()
    if scale == 0:
        return 1.0
    units = margins / scale
    low, high = -math.log(WIDEST), math.log(WIDEST)  # of log b
    if _slope(units, high) <= 0:  # seen here, for further down a slope may be 0 by underflow
        return scale / WIDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(units, middle) < 0 else (low, middle)
    return scale * math.exp(-(low + high) / 2)


def _slope(margins: Tensor, log_b: float) -> float:
    """d/db mean -log sigmoid(b m) = -mean m sigmoid(-b m)."""
    return -(margins * torch.sigmoid(-math.exp(log_b) * margins)).mean().item()


class Bin(NamedTuple):
    """Pairs of like confidence: how sure the model is of its own order of the answers, and how often that order is the voters'."""

    confidence: float  # mean of max(p, 1 - p), from 0.5 to 1
    accuracy: Share  # Wilson's interval, as if the pairs were independent; a tie is half right

    @property
    def n(self) -> int:
        return self.accuracy.n


def reliability(margins: Tensor, temperature: float = 1.0, bins: int = 10) -> list[Bin]:
    """Confidence and accuracy in ``bins`` equal parts of (0.5, 1], empty ones left out, rising (Guo et al. 2017, section 2). margins (P,).

    Of two answers the predicted one has at least one half, so nothing lies below. A part has its upper end, the lowest part also 0.5: all ties.
    """
    margins = _checked(margins)
    confidence = torch.sigmoid(margins.abs() / temperature)
    right = (margins.sign() + 1) / 2
    place = ((2 * confidence - 1) * bins).ceil().long().sub(1).clamp(0, bins - 1)
    members = [place == number for number in range(bins)]
    return [Bin(confidence[x].mean().item(), wilson(right[x].sum().item(), int(x.sum()))) for x in members if x.any()]


def expected_calibration_error(margins: Tensor, temperature: float = 1.0, bins: int = 10) -> float:
    """ECE = sum over bins of n_b / P * |accuracy_b - confidence_b| (Guo et al. 2017, eq. 3), a share from 0 to 1. margins (P,).

    Few pairs give too high a figure: chance alone moves each bin's accuracy by about sqrt(p (1 - p) / n_b).
    """
    found = reliability(margins, temperature, bins)
    return sum(b.n * abs(b.accuracy.value - b.confidence) for b in found) / len(margins)


def _checked(margins: Tensor) -> Tensor:
    assert margins.dim() == 1
    assert len(margins) > 0
    assert margins.isfinite().all()
    return margins.detach().cpu().double()
