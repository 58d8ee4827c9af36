"""Redraw questions with all that belongs to them, for intervals of any statistic."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000  # the ends of an interval are then precise to about a twentieth of its width
LEVEL = 0.95
MOST_WEIGHTS = 2**21  # in memory at a time


def question_numbers(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each question's number, (N,), counted from 0 in the order of the ids."""
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


def draw_weights(num_questions: int, *, draws: int = DRAWS, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Yield how often each question was drawn, (B, Q) for B draws at a time (Efron's bootstrap)."""
    generator = np.random.default_rng(seed)
    shares = np.full(num_questions, 1 / num_questions)
    size = max(1, MOST_WEIGHTS // num_questions)
    for first in range(0, draws, size):
        drawn = generator.multinomial(num_questions, shares, size=min(size, draws - first))
        yield drawn.astype(np.float64)


def redraw(sums: NDArray[np.float64], *, draws: int = DRAWS, seed: int = 0) -> NDArray[np.float64]:
    """Return sums over redrawn questions, (D, ...), of what each adds to a statistic, (Q, ...)."""
    flat = sums.reshape(len(sums), -1)
    parts = [weights @ flat for weights in draw_weights(len(sums), draws=draws, seed=seed)]
    return np.concatenate(parts).reshape(-1, *sums.shape[1:])


def percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of values over draws, (D,); NaN ones are left out."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
