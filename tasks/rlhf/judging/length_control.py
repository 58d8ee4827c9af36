"""Estimate the win rate that two policies would have if their answers were equally long."""

import numpy as np
from numpy.typing import NDArray
from scipy import special

from tasks.rlhf.evaluation.intervals import Interval, wilson
from tasks.rlhf.evaluation.resampling import draw_weights, percentiles, question_numbers
from tasks.rlhf.judging.verdicts import Outcomes

DRAWS = 500
RIDGE = 1e-4  # of the slopes, for each outcome: data that a line separates would let them grow without end
MAX_STEPS, MAX_STEP, PRECISION = 50, 2.0, 1e-6  # of Newton's method


def length_feature(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return tanh of the difference in length over its standard deviation, (N,) (AlpacaEval, 2404.04475)."""
    difference = ours - theirs
    spread = difference.std()
    return np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))


def controlled_rate(
    outcomes: Outcomes, features: NDArray[np.float64], questions: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """Return the win rate at features 0 by logistic regression, with its interval by redrawing questions.

    outcomes (N,), a tie counts as half a win and half a loss; features (N, F), such as ``length_feature`` and
    differences in style (arena-hard's style control). The slopes have a small ridge penalty, the intercept
    has none. NaN with [0, 1] if nothing could be read.
    """
    known = ~np.isnan(outcomes)
    y, x, numbers = outcomes[known], features[known], question_numbers(questions[known])
    if not len(y):
        return Interval(float("nan"), 0.0, 1.0, 0)
    n = int(numbers.max()) + 1
    if np.ptp(y) == 0:  # the intercept would be infinite
        return wilson(float(y[0]) * n, n)
    weights = np.concatenate([np.ones((1, n)), *draw_weights(n, draws=DRAWS, seed=seed)])
    rates = special.expit(_intercepts(y, x, weights[:, numbers]))
    return Interval(float(rates[0]), *percentiles(rates[1:]), n)


def _intercepts(
    y: NDArray[np.float64], x: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the intercepts, (D,), of logistic regressions with weights (D, N), by Newton's method.

    y (N,), x (N, F). Steps are limited, because data that are nearly separable let the first ones overshoot.
    """
    design = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    penalty = RIDGE * np.r_[0.0, np.ones(x.shape[1])] * weights.sum(axis=1, keepdims=True)  # (D, 1 + F)
    beta = np.zeros(penalty.shape)
    for _ in range(MAX_STEPS):
        p = special.expit(beta @ design.T)
        gradient = (weights * (y - p)) @ design - penalty * beta
        curvature = np.einsum("dn,nf,ng->dfg", weights * p * (1 - p), design, design, optimize=True)
        diagonal = np.einsum("dff->df", curvature)
        diagonal += penalty + 1e-9  # a draw of equal outcomes has none of its own
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        beta += np.clip(step, -MAX_STEP, MAX_STEP)
        if np.abs(step).max() < PRECISION:
            break
    intercepts: NDArray[np.float64] = beta[:, 0]
    return intercepts
