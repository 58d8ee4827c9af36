"""Redraw questions with all that belongs to them, for intervals of any statistic."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000  # the ends of an interval are then precise to about a twentieth of its width
LEVEL = 0.95


def question_numbers(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each question's number, (N,), counted from 0 in the order of the ids."""
    return np.unique(ids, return_inverse=True)[1].astype(np.int64)


def draw_weights(num_questions: int, *, draws: int = DRAWS, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """Yield, for each draw, how often each question was drawn, (Q,): Efron's bootstrap by clusters."""
    generator = np.random.default_rng(seed)
    shares = np.full(num_questions, 1 / num_questions)
    for _ in range(draws):
        yield generator.multinomial(num_questions, shares).astype(np.float64)


def percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the ends of the 95 % interval of values over draws, (D,); NaN ones are left out."""
    known = values[~np.isnan(values)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
