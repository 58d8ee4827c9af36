"""Compute learning rates and batches as pure functions of the step: a resumed run needs no state for them."""

import math
from typing import Literal

import torch

from tasks.rlhf.compute.seeds import mix

Shape = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, *, peak: float, total: int, warmup: int, shape: Shape) -> float:
    """Return the learning rate of a step (from 0): linear warmup, then decay to 0 at ``total``.

    The shape "constant" does not decay.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 - progress) if shape == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


def num_steps(num_rows: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Return the optimizer steps of ``epochs`` over ``num_rows``, at least one, at most ``max_steps``."""
    steps = max(1, math.ceil(num_rows * epochs / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def evaluation_steps(total: int, evaluations: int) -> set[int]:
    """Return the steps after which to evaluate: evenly spaced, the last one at the end."""
    return {max(1, round(total * number / evaluations)) for number in range(1, evaluations + 1)}


def batch_indices(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Return the rows of batch ``step``; every epoch has a fresh order, drawn from (seed, epoch)."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, num_rows)
        generator = torch.Generator().manual_seed(mix(seed, epoch))
        order = torch.randperm(num_rows, generator=generator).tolist()
        rows = order[offset : offset + batch_size - len(indices)]
        indices += rows
        position += len(rows)
    return indices
