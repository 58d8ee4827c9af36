"""Measure how far several raters agree: Krippendorff's alpha for nominal labels.

Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability". Raters may label different pairs, and a pair
may have any number of labels. 1: all agree; 0: as chance would; NaN: no pair with two labels, or all labels
are equal. Cohen's kappa of two raters is in report_card.py.
"""

import numpy as np
from numpy.typing import NDArray

from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.resampling import percentiles, redraw

MISSING = -1  # of a label


def krippendorff_alpha(labels: NDArray[np.int64]) -> float:
    """Return the alpha of labels (R, N) of N units by R raters; ``MISSING`` where a rater gave none."""
    return float(_alpha(coincidences(labels).sum(axis=0)))


def alpha_interval(labels: NDArray[np.int64], *, seed: int = 0) -> Interval:
    """Return the alpha of labels (R, N) with its 95 % interval by redrawing units; n counts those with two
    labels or more.
    """
    found = coincidences(labels)
    found = found[found.any(axis=(1, 2))]
    if not len(found):
        return Interval(float("nan"), -1.0, 1.0, 0)
    draws = _alpha(redraw(found, seed=seed))
    ends = (-1.0, 1.0) if np.isnan(draws).all() else percentiles(draws)
    return Interval(float(_alpha(found.sum(axis=0))), *ends, len(found))


def coincidences(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each unit's part of the coincidence matrix, (R, N) -> (N, K, K) for labels 0 to K - 1.

    A unit with m labels counts each ordered pair of them, by two raters, 1 / (m - 1) times.
    """
    size = int(labels.max(initial=0)) + 1
    counts = (labels.T[:, :, None] == np.arange(size)).sum(axis=1).astype(np.float64)  # (N, K)
    pairs: NDArray[np.float64] = counts[:, :, None] * counts[:, None, :]
    pairs -= counts[:, :, None] * np.eye(size)  # a label is not compared with itself
    given = counts.sum(axis=1)
    return np.where((given > 1)[:, None, None], pairs / np.maximum(given - 1, 1)[:, None, None], 0.0)


def _alpha(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the alpha of coincidence matrices, (..., K, K) -> (...): 1 - observed / expected."""
    of_label = matrix.sum(axis=-1)  # n_c
    n = of_label.sum(axis=-1)
    different = n - np.trace(matrix, axis1=-2, axis2=-1)
    expected = n**2 - (of_label**2).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        alpha: NDArray[np.float64] = np.where(expected > 0, 1 - (n - 1) * different / expected, np.nan)
    return alpha
