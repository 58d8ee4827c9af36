"""Who wins: comparisons of scores, and how often they agree."""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval, wilson


class Tally(NamedTuple):
    """How one policy's answers fare against another's on the same questions."""

    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> Interval:
        """Share of wins with Wilson's 95 % interval; a tie is half a win."""
        return wilson(self.wins + self.ties / 2, self.wins + self.ties + self.losses)


def compare(ours: Sequence[float], theirs: Sequence[float], *, tie: float = 0.0) -> Tally:
    """Tally of scores of answers to the same questions; a difference of at most ``tie`` is a tie."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    wins, defeats = sum(d > tie for d in differences), sum(d < -tie for d in differences)
    return Tally(wins, len(differences) - wins - defeats, defeats)


def ordering_agreement(judged: Sequence[Sequence[float]], truth: Sequence[Sequence[float]]) -> Interval:
    """How often ``judged`` orders two items of a group as ``truth`` does, over all pairs of a group that ``truth`` tells apart.

    A pair that only ``judged`` ties is not ordered rightly. Pairs of a group share items, so whole groups are redrawn for the interval.
    """
    right: list[float] = []
    group: list[int] = []
    for number, (scores, golds) in enumerate(zip(judged, truth, strict=True)):
        assert len(scores) == len(golds)
        for i, j in combinations(range(len(golds)), 2):
            if golds[i] != golds[j]:
                right.append(
                    float(scores[i] != scores[j] and (scores[i] > scores[j]) == (golds[i] > golds[j]))
                )
                group.append(number)
    if not right:
        return wilson(0, 0)
    return pair_accuracy.wider_interval(pair_accuracy.measure(torch.tensor(right), torch.tensor(group)))
