"""Who wins: comparisons of scores, and how often they agree."""

from collections.abc import Sequence
from typing import NamedTuple

from tasks.rlhf.intervals import Share, wilson


class Tally(NamedTuple):
    """How one policy's answers fare against another's on the same questions."""

    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> Share:
        """Share of wins with Wilson's 95 % interval; a tie is half a win."""
        return wilson(self.wins + self.ties / 2, self.wins + self.ties + self.losses)


def compare(ours: Sequence[float], theirs: Sequence[float], *, tie: float = 0.0) -> Tally:
    """Tally of scores of answers to the same questions; a difference of at most ``tie`` is a tie."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    wins, defeats = sum(d > tie for d in differences), sum(d < -tie for d in differences)
    return Tally(wins, len(differences) - wins - defeats, defeats)


def ordering_agreement(judged: Sequence[Sequence[float]], truth: Sequence[Sequence[float]]) -> Share:
    """How often ``judged`` orders two items of a group as ``truth`` does, over all pairs of a group that ``truth`` tells apart.

    A pair that only ``judged`` ties counts half.
    """
    right, total = 0.0, 0
    for scores, golds in zip(judged, truth, strict=True):
        assert len(scores) == len(golds)
        for i in range(len(golds)):
            for j in range(i):
                if golds[i] != golds[j]:
                    total += 1
                    product = (scores[i] - scores[j]) * (golds[i] - golds[j])
                    right += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    return wilson(right, total)
