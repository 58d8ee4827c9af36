"""Measure how often 95 % intervals of win rates hold the truth, over all kinds of evaluations.

python -m tests.benchmarks.coverage
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np

from tasks.rlhf.evaluation.intervals import Interval, wilson
from tasks.rlhf.judging.verdicts import Outcomes
from tasks.rlhf.judging.win_rate import win_rate

EVALUATIONS = 1000
KINDS = ((1, 0.0, 0.0), (1, 0.0, 0.1), (3, 0.3, 0.0), (3, 0.3, 0.1))  # verdicts, question effect, unparseable


class Cell(NamedTuple):
    """What an evaluation is like."""

    n: int  # questions
    share: float  # true win rate
    ties: float  # 0: none; 2: as many as the share allows
    verdicts: int  # a question
    effect: float  # correlation of verdicts of one question
    unparseable: float  # share


def simulate(cell: Cell, rng: np.random.Generator) -> Outcomes:
    """Return outcomes of one evaluation. (n, verdicts)."""
    tie = cell.ties * (1 - cell.share)
    shares = np.array([cell.share - tie / 2, tie, 1 - cell.share - tie / 2])
    if cell.effect > 0:
        concentration = shares * (1 - cell.effect) / cell.effect
        probabilities = rng.dirichlet(np.maximum(concentration, 1e-9), size=cell.n)[:, None]
    else:
        probabilities = np.broadcast_to(shares, (cell.n, 1, 3))
    drawn = rng.random((cell.n, cell.verdicts))
    won = drawn < probabilities[..., 0]
    tied = drawn < probabilities[..., 0] + probabilities[..., 1]
    outcomes = np.where(won, 1.0, np.where(tied, 0.5, 0.0))
    outcomes[rng.random(outcomes.shape) < cell.unparseable] = np.nan
    return outcomes


def half_wins(outcomes: Outcomes) -> Interval:
    """Return Wilson's interval on half wins of all verdicts, as evaluations had it before."""
    parsed = outcomes[~np.isnan(outcomes)]
    return wilson(float(parsed.sum()), len(parsed))


def by_questions(outcomes: Outcomes) -> Interval:
    """Return the win rate with its interval, of outcomes (n, verdicts)."""
    return win_rate(outcomes.ravel(), np.repeat(np.arange(len(outcomes)), outcomes.shape[1]))


METHODS: dict[str, Callable[[Outcomes], Interval]] = {"win_rate": by_questions, "half wins": half_wins}


def coverages(cell: Cell, *, evaluations: int = EVALUATIONS, seed: int = 0) -> dict[str, float]:
    """Return each method's coverage in percent."""
    rng = np.random.default_rng(
        [
            seed,
            cell.n,
            round(1000 * cell.share),
            round(10 * cell.ties),
            cell.verdicts,
            round(10 * cell.unparseable),
        ]
    )
    held = dict.fromkeys(METHODS, 0)
    for _ in range(evaluations):
        outcomes = simulate(cell, rng)
        for name, method in METHODS.items():
            interval = method(outcomes)
            held[name] += interval.low <= cell.share <= interval.high
    return {name: 100 * count / evaluations for name, count in held.items()}


def main() -> None:
    cells = product((30, 50, 100, 200, 500), (0.5, 0.6, 0.75, 0.9, 0.95), (0.0, 0.8, 1.6), KINDS)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for n, share, ties, (verdicts, effect, unparseable) in cells:
        cell = Cell(n, share, ties, verdicts=verdicts, effect=effect, unparseable=unparseable)
        measured = coverages(cell)
        for name, coverage in measured.items():
            found[name].append(coverage)
        if abs(measured["win_rate"] - 95) > 2:
            print(cell, measured, flush=True)
    for name, values in found.items():
        outside = sum(abs(value - 95) > 2 for value in values)
        print(
            f"{name:<10} {min(values):.1f} to {max(values):.1f} %, {outside} of {len(values)} beyond 95 +- 2"
        )


if __name__ == "__main__":
    main()
