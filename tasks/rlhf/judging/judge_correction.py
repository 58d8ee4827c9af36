"""Correct a win rate for the judge's errors, which are measured on votes."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.resampling import percentiles, question_numbers, redraw
from tasks.rlhf.judging.verdicts import Outcomes

LEAST_SKILL = 0.1  # of q0 + q1 - 1: below it the correction multiplies every error by ten and more


class Graded(NamedTuple):
    """A judge's verdicts on pairs that voters have ordered."""

    better_first: Outcomes  # (M,), outcome of the better answer where it was shown first
    better_second: Outcomes  # (M,), outcome of the better answer where it was shown second
    questions: NDArray[np.int64]  # (M,)


def corrected_rate(rate: float, right_if_first: float, right_if_second: float) -> float:
    """Return the true share of wins: (p + q0 - 1) / (q0 + q1 - 1) (Rogan and Gladen 1978).

    ``rate`` p is the share that the judge saw; q1 and q0 are its shares right where the first and where the
    second answer is better. The result is not limited to [0, 1].
    """
    return (rate + right_if_second - 1) / (right_if_first + right_if_second - 1)


def corrected_interval(
    outcomes: Outcomes, questions: NDArray[np.int64], graded: Graded, *, seed: int = 0
) -> Interval | None:
    """Return the corrected win rate with its interval, within [0, 1]; None if the judge's skill is not shown.

    Skill is q0 + q1 - 1: 1 for a perfect judge, 0 for one that guesses. Both the judged questions and the
    graded ones are redrawn, so the interval carries the uncertainty of q0 and q1 (2511.21140). It is shown
    only if the skill's lower bound is above ``LEAST_SKILL``.
    """
    judged = _sums(outcomes[:, None], questions)
    skills = _sums(np.stack([graded.better_first, graded.better_second], axis=1), graded.questions)
    rates = _means(redraw(judged, seed=seed))[:, 0]
    q1, q0 = _means(redraw(skills, seed=seed + 1)).T
    if np.isnan(q1 + q0).all() or percentiles(q1 + q0 - 1)[0] < LEAST_SKILL:
        return None
    draws = np.clip([corrected_rate(*one) for one in zip(rates, q1, q0, strict=True)], 0, 1)
    (rate,), (right_first, right_second) = (_means(sums.sum(axis=0)) for sums in (judged, skills))
    value = float(np.clip(corrected_rate(rate, right_first, right_second), 0, 1))
    return Interval(value, *percentiles(draws), len(judged))


def _sums(values: NDArray[np.float64], questions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return sum and number of the known values of each question, (Q, 2, C), for columns (N, C)."""
    numbers, known = question_numbers(questions), ~np.isnan(values)
    columns = [
        np.stack([np.bincount(numbers, np.where(is_known, column, 0)), np.bincount(numbers, is_known)], 1)
        for column, is_known in zip(values.T, known.T, strict=True)
    ]
    return np.stack(columns, axis=2)


def _means(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means of sums and numbers, (..., 2, C) -> (..., C); NaN where nothing is known."""
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = totals[..., 0, :] / totals[..., 1, :]
    return means
