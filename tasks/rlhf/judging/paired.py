"""Compare two models that answered the same questions."""

from math import comb

import torch
from torch import Tensor

from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.pair_accuracy import clustered_mean


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the two-sided p-value of McNemar's exact test (1947).

    The counts are of the questions that only the first or only the second model answered right; if the models
    are equal, each is as likely.
    """
    n = first_only + second_only
    tail = sum(comb(n, k) for k in range(min(first_only, second_only) + 1))
    return float(min(1.0, 2 * tail / 2**n))


def accuracy_difference(ours: Tensor, theirs: Tensor) -> Interval:
    """Return the rate of ``ours`` minus that of ``theirs`` on the same questions, by redrawing questions.

    ours (N,), theirs (N,), 0 or 1.
    """
    return clustered_mean(ours - theirs, torch.arange(len(ours)), bounds=(-1.0, 1.0))
