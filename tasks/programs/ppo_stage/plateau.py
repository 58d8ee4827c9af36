"""Find out whether an independent score has stopped rising although PPO goes on: over-optimisation.

Measurements are of the same prompts with the same random numbers, so they are compared prompt by prompt.
"""

import math
from collections.abc import Sequence

import torch

from tasks.programs.ppo_stage.independent_score import KEPT, Measurement

# Standard errors of the mean difference to the best, or of a trend. Of measurements that differ by chance
# alone, 1 % of runs with 7 and 3 % with 13 have two in a row so far below the best of those before.
FALL = 2.5
IN_A_ROW = 2  # measurements


def describe_fall(best: Measurement, now: Measurement) -> str:
    """Return a phrase if the score is far below its best, "" if not."""
    if standard_errors(best.scores, now.scores) <= FALL:
        return ""
    return (
        f"the independent score has fallen to {now.score.value:.3g} from {best.score.value:.3g} "
        f"after step {best.step}"
    )


def describe_divergence(recent: Sequence[Measurement]) -> str:
    """Return a phrase if the reward rises while the score falls, over the last measurements, "" if not."""
    if len(recent) < KEPT:
        return ""
    recent = recent[-KEPT:]
    falls = trend_errors([one.scores for one in recent]) < -FALL
    rises = trend_errors([one.rewards for one in recent]) > FALL
    if not (falls and rises):
        return ""
    first, last = recent[0].point, recent[-1].point
    return (
        f"the reward has risen from {first['score_reward']:.3g} to {last['score_reward']:.3g} since step "
        f"{recent[0].step}, and the independent score has fallen from {first['independent_score']:.3g} "
        f"to {last['independent_score']:.3g}"
    )


def standard_errors(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the mean of the paired differences ``first`` - ``second`` in their standard errors."""
    return _t(torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64))


def trend_errors(measurements: Sequence[Sequence[float]]) -> float:
    """Return the mean slope of (M, P) figures over the measurements in its standard errors."""
    values = torch.tensor(measurements, dtype=torch.float64)
    times = torch.arange(len(values), dtype=torch.float64)
    return _t((times - times.mean()) @ values)


def _t(values: torch.Tensor) -> float:
    """Return the mean in its standard errors; 0 of equal values of 0, infinite of other equal values."""
    mean, error = values.mean().item(), values.std().item() / math.sqrt(len(values))
    return mean / error if error else math.copysign(math.inf, mean) if mean else 0.0
