"""Estimate best-of-n sampling: answer n times and keep the answer that the reward model likes best.

It is the reference curve of over-optimisation (Gao et al. 2022): its KL from the model that answers is known.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n from the model that answers, in nats an answer: log n - (n - 1) / n."""
    return math.log(n) - (n - 1) / n


def best_of_n(rewards: Tensor, scores: Tensor, n: int) -> Tensor:
    """Return each prompt's expected score of the answer with the highest of n rewards, (P,).

    ``rewards`` and ``scores`` (P, N) are of N >= n answers to each prompt. The estimate is unbiased: it is
    the mean over all choices of n of them (Nakano et al. 2021, appendix I). The answer with the i-th lowest
    reward, i from 1, is the best of C(i - 1, n - 1) of the C(N, n) choices.
    """
    count = rewards.shape[1]
    assert 1 <= n <= count
    choices = [math.comb(rank, n - 1) / math.comb(count, n) for rank in range(count)]
    order = rewards.argsort(dim=1, stable=True)
    return scores.gather(1, order).double() @ torch.tensor(choices, dtype=torch.float64)


def powers_of_two(most: int) -> Sequence[int]:
    """Return 1, 2, 4, ... up to ``most``."""
    return [2**power for power in range(most.bit_length())]
