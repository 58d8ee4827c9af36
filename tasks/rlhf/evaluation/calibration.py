"""Whether a reward model's pair probabilities p = sigmoid((r_w - r_l) / T) mean what they say, and the temperature T that makes them.

A margin is r_w - r_l: the chosen answer's reward minus the rejected one's, in reward units, so a model that is right has positive margins. Fit T on
other pairs than those that the calibration error is told of: on its own pairs T is a little too good.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval

TEMPERATURE_BOUND = 100.0  # T lies between a hundredth and a hundred times the mean |margin|
DRAWS = 1000  # simulations of a perfect model
CHUNK = 2**22  # numbers drawn at a time
HALVINGS = 60  # of the interval of log T: to the last digits of a float64


def fit_temperature(margins: Tensor) -> float:
    """T > 0 with the least mean -log sigmoid(margin / T) (Guo et al. 2017, section 4.2, for two classes). margins (P,), P >= 1.

    The loss is convex in b = 1/T: its slope only rises, and where it crosses 0 is found by halving, which no start and no curvature can mislead.

    Two kinds of margins have no best T, and get a bound. Where no margin is negative, b grows for ever: T is mean |margin| / WIDEST, and a usual pair
    is certain. Where the model is no better than chance (mean margin <= 0), b is 0 or below: T is WIDEST * mean |margin|, and every p about 1/2.
    The bounds go with the margins, so margins times c always give T times c. Margins that are all 0 give T = 1.
    """
    margins = _validate(margins)
    scale = margins.abs().mean().item()
    if scale == 0:
        return 1.0
    units = margins / scale
    low, high = -math.log(TEMPERATURE_BOUND), math.log(TEMPERATURE_BOUND)  # of log b
    if _slope(units, high) <= 0:  # seen here, for further down a slope may be 0 by underflow
        return scale / TEMPERATURE_BOUND
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _slope(units, middle) < 0 else (low, middle)
    return scale * math.exp(-(low + high) / 2)


def reason_not_to_fit(margins: Tensor) -> str:
    """Return why margins have no best temperature, or nothing where they have one. margins (P,)."""
    if not len(margins) or not (margins := _validate(margins)).any():
        return "no two rewards differ"
    if not (margins < 0).any():
        return "every pair is ordered as the votes do, and the larger the probabilities were the better they would fit"
    if not (margins > 0).any():
        return "no pair is ordered as the votes do"
    if margins.mean() <= 0:
        return "the rewards order pairs no better than chance"
    return ""


def _slope(margins: Tensor, log_b: float) -> float:
    """d/db mean -log sigmoid(b m) = -mean m sigmoid(-b m)."""
    return -(margins * torch.sigmoid(-math.exp(log_b) * margins)).mean().item()


class Bin(NamedTuple):
    """Pairs of like confidence: how sure the model is of its own order of the answers, and how often that order is the voters'."""

    confidence: float  # mean of max(p, 1 - p), from 0.5 to 1
    accuracy: Interval  # a tie, whose confidence is a half, is half right

    @property
    def n(self) -> int:
        return self.accuracy.n


def reliability(
    margins: Tensor, temperature: float = 1.0, bins: int = 10, *, question: Tensor | None = None
) -> list[Bin]:
    """Confidence and accuracy in ``bins`` equal parts of (0.5, 1], empty ones left out, rising (Guo et al. 2017, section 2). margins (P,).

    Of two answers the predicted one has at least one half, so nothing lies below. A part has its upper end, the lowest part also 0.5: all ties.
    ``question`` (P,) says which pairs belong together; without it each pair is a question of its own.
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
    """max(p, 1 - p) of each pair."""
    return torch.sigmoid(margins.abs() / temperature)


def _bin_index(margins: Tensor, temperature: float, bins: int) -> Tensor:
    """The bin of each pair."""
    return ((2 * _confidence(margins, temperature) - 1) * bins).ceil().long().sub(1).clamp(0, bins - 1)


def expected_calibration_error(margins: Tensor, temperature: float = 1.0, bins: int = 10) -> float:
    """ECE = sum over bins of n_b / P * |accuracy_b - confidence_b| (Guo et al. 2017, eq. 3), a share from 0 to 1. margins (P,).

    Few pairs give too high a figure: chance alone moves each bin's accuracy by about sqrt(p (1 - p) / n_b); see ``noise_floor``.
    """
    margins = _validate(margins)
    right = (margins.sign() + 1) / 2
    return _error(
        right[None], _confidence(margins, temperature), _bin_index(margins, temperature, bins), bins
    ).item()


def noise_floor(
    margins: Tensor, temperature: float = 1.0, bins: int = 10, *, seed: int = 0, draws: int = DRAWS
) -> float:
    """Return the mean ECE that a model with these confidences has by chance alone if it means exactly what it says. margins (P,).

    In each of ``draws`` simulations every pair is right with the probability that is its confidence, independently of the others; a tie is
    half right.
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
    """ECE of several outcomes of the same pairs: right (R, P), confidence (P,), place (P,) -> (R,). n_b |accuracy_b - confidence_b| is |a sum|."""
    differences = torch.zeros(len(right), bins, dtype=torch.float64).index_add(1, place, right - confidence)
    return differences.abs().sum(dim=1) / len(confidence)


def _validate(margins: Tensor) -> Tensor:
    assert margins.dim() == 1
    assert len(margins) > 0
    assert margins.isfinite().all()
    return margins.detach().cpu().double()
