"""Combine a judge's verdicts on two answers, shown in both orders, into outcomes."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["first", "second", "tie", "unparseable"]
Outcomes = NDArray[np.float64]  # 1 won, 0.5 tied, 0 lost, NaN if a verdict could not be read

_VALUES = {"first": 1.0, "second": 0.0, "tie": 0.5, "unparseable": np.nan}


class Resolved(NamedTuple):
    """The outcomes of battles that were shown in both orders."""

    outcomes: Outcomes  # (N,), of the answer that was shown first in the first order
    flipped: NDArray[np.bool_]  # (N,), whether the verdict changed with the order: such a battle is a tie


def to_outcomes(verdicts: Sequence[Verdict]) -> Outcomes:
    """Return each verdict, (N,), as the outcome of the answer that was shown first."""
    return np.array([_VALUES[one] for one in verdicts], dtype=np.float64)


def resolve(forward: Sequence[Verdict], backward: Sequence[Verdict]) -> Resolved:
    """Return the outcomes of battles; in ``backward`` the answers were shown the other way round.

    A verdict that flips with the order says nothing about the answers, so it is a tie (MT-Bench, section
    3.4). A win in one order and a tie in the other is a tie too. If one verdict cannot be read the outcome is
    NaN: neither a loss nor a tie.
    """
    ours, theirs = to_outcomes(forward), 1 - to_outcomes(backward)
    outcomes = np.where(ours == theirs, ours, 0.5)
    outcomes[np.isnan(ours) | np.isnan(theirs)] = np.nan
    return Resolved(outcomes, np.abs(ours - theirs) == 1)


class Counts(NamedTuple):
    """Numbers of battles by outcome."""

    wins: int
    ties: int
    losses: int
    unparseable: int

    @classmethod
    def of(cls, outcomes: Outcomes) -> "Counts":
        """Count outcomes."""
        wins, ties, losses = (int((outcomes == value).sum()) for value in (1, 0.5, 0))
        return cls(wins, ties, losses, int(np.isnan(outcomes).sum()))
