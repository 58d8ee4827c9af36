"""Compute win rates of one policy's answers against another's, and the agreement of two judges."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval, wilson


class Tally(NamedTuple):
    """Wins, ties and losses of one policy's answers against another's to the same questions."""

    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> Interval:
        """Return the share of wins with Wilson's 95 % interval; a tie is half a win."""
        return wilson(self.wins + self.ties / 2, self.wins + self.ties + self.losses)


def compare(ours: Sequence[float], theirs: Sequence[float], *, tie: float = 0.0) -> Tally:
    """Count wins of ``ours`` by the scores of answers to the same questions; a gap up to ``tie`` is a tie."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    wins, defeats = sum(d > tie for d in differences), sum(d < -tie for d in differences)
    return Tally(wins, len(differences) - wins - defeats, defeats)


def ordering_agreement(judged: Sequence[Sequence[float]], truth: Sequence[Sequence[float]]) -> Interval:
    """Return how often scores of ``judged`` order two items of a group as those of ``truth`` do.

    All pairs of a group count that ``truth`` does not tie. A pair that only ``judged`` ties is not ordered
    correctly. Pairs of a group share items, so the interval is bootstrapped over whole groups.
    """
    right: list[float] = []
    group: list[int] = []
    for number, (scores, golds) in enumerate(zip(judged, truth, strict=True)):
        assert len(scores) == len(golds)
        for i, j in combinations(range(len(golds)), 2):
            if golds[i] != golds[j]:
                is_same = scores[i] != scores[j] and (scores[i] > scores[j]) == (golds[i] > golds[j])
                right.append(float(is_same))
                group.append(number)
    if not right:
        return wilson(0, 0)
    return pair_accuracy.wider_interval(pair_accuracy.measure(torch.tensor(right), torch.tensor(group)))
