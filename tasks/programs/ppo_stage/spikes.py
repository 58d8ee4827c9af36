"""Find figures of a step that are far outside their own recent range.

The range is the median and the median absolute deviation of the last batches, which a few outliers do not
move. Figures that are positive and vary by orders of magnitude are compared by their logarithms.
"""

import math
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

WINDOW, LEAST = 16, 8  # batches of the range; with fewer there is none
NORMAL = 1.4826  # standard deviations of a normal distribution per median absolute deviation
SMALLEST = 1e-8  # of a logarithm


class Watched(NamedTuple):
    """How a figure is compared: ``floor`` is its smallest deviation, so that a constant has a range too."""

    label: str
    floor: float
    is_logarithm: bool = True
    is_two_sided: bool = False


WATCHED = {
    "reward": Watched("the reward", 0.1, is_logarithm=False, is_two_sided=True),
    "policy_loss": Watched("the policy loss", 0.01, is_logarithm=False),
    "value_loss": Watched("the value loss", 0.25),
    "gradient_norm": Watched("the gradient norm", 0.25),
    "approx_kl": Watched("the size of an update", 1.0),
}

Ranges = dict[str, list[float]]  # the last values by name


def describe_spike(ranges: Ranges, figures: Mapping[str, float], limit: float) -> str:
    """Return a phrase on the figure that is furthest outside its range, if one is by more than ``limit``."""
    found = []
    for name, watched in WATCHED.items():
        if name in figures and len(recent := ranges.get(name, [])) >= LEAST:
            found.append((deviations(recent, figures[name], watched), name))
    far, name = max(found, default=(0.0, ""))
    if far <= limit:
        return ""
    return (
        f"{WATCHED[name].label} was {figures[name]:.3g} against a median of {median(ranges[name]):.3g} "
        f"before, {far:.0f} robust standard deviations away"
    )


def deviations(recent: list[float], value: float, watched: Watched) -> float:
    """Return how many robust standard deviations a value is outside the range of recent ones."""
    if watched.is_logarithm:
        recent, value = [_log(one) for one in recent], _log(value)
    middle = median(recent)
    spread = max(watched.floor, NORMAL * median(abs(one - middle) for one in recent))
    gap = value - middle
    return (abs(gap) if watched.is_two_sided else max(0.0, gap)) / spread


def remember(ranges: Ranges, figures: Mapping[str, float]) -> Ranges:
    """Return the ranges with the figures of one more batch."""
    new = {name: [*ranges.get(name, []), figures[name]][-WINDOW:] for name in WATCHED if name in figures}
    return ranges | new


def _log(value: float) -> float:
    return math.log(max(value, SMALLEST))
