"""Measure the calibration of pair probabilities p = sigmoid((r_w - r_l) / T), and fit the temperature T.

A margin is r_w - r_l, the chosen answer's reward minus the rejected one's: positive if the model is right.
Fit T on other pairs than those on which the calibration error is measured: on its own pairs the error is too
small.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval

TEMPERATURE_BOUND = 100.0  # T is between a hundredth and a hundred times the mean |margin|
DRAWS = 1000  # simulations of a perfect model
CHUNK = 2**22  # numbers drawn at a time
HALVINGS = 60  # of the interval of log T, down to a float64's precision


def fit_temperature(margins: Tensor) -> float:
    """Return the T > 0 with the least mean -log sigmoid(margin / T). margins (P,), P >= 1.

    Guo et al. 2017 (arXiv 1706.04599), section 4.2, for two classes. The loss is convex in b = 1/T, so its
    slope rises, and bisection finds where it crosses 0 from any start.

    Two kinds of margins have no best T, and get a bound. If no margin is negative, b has no limit: T is mean
    |margin| / TEMPERATURE_BOUND, and a typical pair is certain. If the model is no better than chance (mean
    margin <= 0), b is 0 or less: T is TEMPERATURE_BOUND * mean |margin|, and every p about 1/2. The bounds
    scale with the margins, so margins times c always give T times c. Margins that are all 0 give T = 1.
    """
    margins = _validate(margins)
    scale = margins.abs().mean().item()
    if scale == 0:
        return 1.0
    units = margins / scale
    low, high = -math.log(TEMPERATURE_BOUND), math.log(TEMPERATURE_BOUND)  # of log b
    if _slope(units, high) <= 0:  # checked here, because a slope may underflow to 0 during bisection
        return scale / TEMPERATURE_BOUND
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(units, middle) < 0 else (low, middle)
    return scale * math.exp(-(low + high) / 2)


def reason_not_to_fit(margins: Tensor) -> str:
    """Return why margins have no best temperature, "" if they have one. margins (P,)."""
    if not len(margins) or not (margins := _validate(margins)).any():
        return "no two rewards differ"
    if not (margins < 0).any():
        return (
            "every held-out pair is ordered as its label says, and the larger the "
            "probabilities were the better they would fit"
        )
    if not (margins > 0).any():
        return "no held-out pair is ordered as its label says"
    if margins.mean() <= 0:
        return "the rewards order held-out pairs no better than chance"
    return ""


def _slope(margins: Tensor, log_b: float) -> float:
    """Return d/db mean -log sigmoid(b m) = -mean m sigmoid(-b m)."""
    return -(margins * torch.sigmoid(-math.exp(log_b) * margins)).mean().item()


class Bin(NamedTuple):
    """Pairs of similar confidence: how certain the model is of its order, and how often voters agree."""

    confidence: float  # mean of max(p, 1 - p), from 0.5 to 1
    accuracy: Interval  # a tie, whose confidence is a half, is half right

    @property
    def n(self) -> int:
        """Return the number of pairs."""
        return self.accuracy.n


def reliability(
    margins: Tensor, temperature: float = 1.0, bins: int = 10, *, question: Tensor | None = None
) -> list[Bin]:
    """Return confidence and accuracy in ``bins`` equal parts of (0.5, 1], without empty ones. margins (P,).

    Guo et al. 2017, section 2. Of two answers the predicted one has at least one half. A bin contains its
    upper end, the lowest one also 0.5, which is all ties. ``question`` (P,) says which pairs belong together;
    without it each pair is a question of its own.
    """
    margins = _validate(margins)
    question = torch.arange(len(margins)) if question is None else question
    confidence, place = _confidence(margins, temperature), _bin_index(margins, temperature, bins)
    right = (margins.sign() + 1) / 2
    members = [place == number for number in range(bins)]
    return [
        Bin(
            confidence[x].mean().item(),
            pair_accuracy.wider_interval(pair_accuracy.measure(right[x], question[x])),
        )
        for x in members
        if x.any()
    ]


def _confidence(margins: Tensor, temperature: float) -> Tensor:
    """Return max(p, 1 - p) of each pair."""
    return torch.sigmoid(margins.abs() / temperature)


def _bin_index(margins: Tensor, temperature: float, bins: int) -> Tensor:
    """Return the bin of each pair."""
    return ((2 * _confidence(margins, temperature) - 1) * bins).ceil().long().sub(1).clamp(0, bins - 1)


def expected_calibration_error(margins: Tensor, temperature: float = 1.0, bins: int = 10) -> float:
    """Return the expected calibration error, 0 to 1 (Guo et al. 2017, eq. 3). margins (P,).

    ECE = sum over bins b of n_b / P * |accuracy_b - confidence_b|

    With few pairs it is too high: chance alone moves each bin's accuracy by about sqrt(p (1 - p) / n_b); see
    `noise_floor`.
    """
    margins = _validate(margins)
    right = (margins.sign() + 1) / 2
    return _error(
        right[None], _confidence(margins, temperature), _bin_index(margins, temperature, bins), bins
    ).item()


def noise_floor(
    margins: Tensor, temperature: float = 1.0, bins: int = 10, *, seed: int = 0, draws: int = DRAWS
) -> float:
    """Return the mean ECE that a perfectly calibrated model with these confidences has by chance.

    margins (P,).

    In each of ``draws`` simulations every pair is right with the probability that is its confidence,
    independently of the others; a tie is half right.
    """
    margins = _validate(margins)
    confidence, place = _confidence(margins, temperature), _bin_index(margins, temperature, bins)
    generator = torch.Generator().manual_seed(seed)
    total, left = 0.0, draws
    while left:
        count = min(left, max(1, CHUNK // len(margins)))
        right = (
            torch.rand(count, len(margins), generator=generator, dtype=torch.float64) < confidence
        ).double()
        right[:, margins == 0] = 0.5
        total += _error(right, confidence, place, bins).sum().item()
        left -= count
    return total / draws


def _error(right: Tensor, confidence: Tensor, place: Tensor, bins: int) -> Tensor:
    """Return the ECE of R outcomes of the same pairs, (R,); right (R, P), confidence (P,), bins (P,).

    n_b |accuracy_b - confidence_b| is the absolute value of a sum over the bin.
    """
    differences = torch.zeros(len(right), bins, dtype=torch.float64).index_add(1, place, right - confidence)
    return differences.abs().sum(dim=1) / len(confidence)


def _validate(margins: Tensor) -> Tensor:
    assert margins.dim() == 1
    assert len(margins) > 0
    assert margins.isfinite().all()
    return margins.detach().cpu().double()
