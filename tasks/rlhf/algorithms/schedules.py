"""Learning rates and data orders as pure functions of the step, so that a resumed run needs no state for them."""

import math
from typing import Literal

import torch

from tasks.rlhf.compute.seeds import mix

Shape = Literal["linear", "cosine", "constant"]


def learning_rate(step: int, *, peak: float, total: int, warmup: int, shape: Shape) -> float:
    """Rate of step ``step`` (from 0): rises linearly over ``warmup`` steps, then falls to 0 at ``total`` (or stays, where it is constant)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (1 - progress) if shape == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


def num_steps(num_rows: int, *, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of ``epochs`` passes over ``num_rows``, at least one, at most ``max_steps``."""
    steps = max(1, math.ceil(num_rows * epochs / batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def evaluation_steps(total: int, evaluations: int) -> set[int]:
    """After which of ``total`` steps the held-out part is looked at: evenly spread, the last time at the end."""
    return {max(1, round(total * number / evaluations)) for number in range(1, evaluations + 1)}


def batch_indices(step: int, *, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Rows of batch ``step`` when passes over ``num_rows`` rows, each in a fresh order drawn from (seed, pass), follow one another."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, num_rows)
        order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(mix(seed, epoch))).tolist()
        taken = order[offset : offset + batch_size - len(indices)]
        indices += taken
        position += len(taken)
    return indices
