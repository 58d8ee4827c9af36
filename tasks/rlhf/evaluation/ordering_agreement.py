"""Measure how often two judges order the answers of a group alike."""

from collections.abc import Sequence
from itertools import combinations

import torch

from tasks.rlhf.evaluation import pair_accuracy
from tasks.rlhf.evaluation.intervals import Interval, wilson


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
