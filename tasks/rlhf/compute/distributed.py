"""Train one model with several processes (ranks), each on its part of every optimizer step.

Losses are divided by the rows of the whole step, so the step's loss and gradients are the sums of the ranks'
own. CPU values are sent with gloo, tensors on a GPU with NCCL. Sums are bit-equal on all ranks, so decisions
that depend on them agree.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tasks.rlhf.compute import accelerate_launch
from tasks.system import processes
from tasks.system.errors import InputError
from tasks.system.torchrun import PeersLost, is_first, rank, world

__all__ = [
    "all_gather",
    "all_reduce",
    "barrier",
    "check_equal",
    "is_first",
    "map_over_ranks",
    "padded_steps",
    "process_group",
    "rank",
    "rank_slice",
    "run_together",
    "sum_gradients",
    "world",
]

# For slow ranks; one that has died is noticed at once, by torchrun and by its closed connections.
TIMEOUT = timedelta(minutes=30)
EXCHANGE_SECONDS = 2.0  # between two exchanges of ranks whose work takes unequally long
BUCKET = 64 << 20  # bytes of gradients that are summed in one call

T = TypeVar("T")
R = TypeVar("R")
Rows = TypeVar("Rows", Tensor, list[Any])


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks for a block, which ends when all have finished it.

    Raises PeersLost if another rank died, InputError if `accelerate launch` asks for what is not supported.
    """
    accelerate_launch.check(os.environ)
    accelerate_launch.load_on_every_rank(os.environ)
    if world() == 1:
        yield
        return
    processes.die_with_parent()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT
        )
        yield
        barrier()
    except RuntimeError as error:
        # gloo has no error class of its own, but names its source file
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise PeersLost(f"Rank {rank()} of {world()} has lost another: {error}") from error
        raise
    dist.destroy_process_group()


def rank_slice(rows: Rows) -> Rows:
    """Return this rank's part of a step's rows; empty if there are fewer rows than ranks."""
    return rows[rank() :: world()]


def padded_steps(parts: Sequence[T], spare: T) -> list[tuple[T, bool]]:
    """Return ``parts`` with True, then ``spare`` with False until all ranks have equally many.

    Sharded weights are gathered by all ranks together, so each must take equally many forward passes.
    """
    longest = max(all_gather(len(parts)))
    return [*((part, True) for part in parts), *[(spare, False)] * (longest - len(parts))]


def map_over_ranks(
    parts: Sequence[T],
    compute: Callable[[T], R],
    *,
    report_progress: Callable[[int, int], None] | None = None,
) -> list[R]:
    """Return ``compute(part)`` of each part, on all ranks; one rank computes each.

    Tensors must be on the CPU.

    Sharded weights are gathered by all ranks together, so a rank with fewer parts computes the first one
    again and the result is dropped. ``report_progress`` is called with the number of parts done, if all ranks
    are equally fast, and in all.
    """
    rounds = -(-len(parts) // world())
    own = []
    for index in range(rank(), rounds * world(), world()):
        own.append(compute(parts[index] if index < len(parts) else parts[0]))
        if report_progress:
            report_progress(min(len(own) * world(), len(parts)), len(parts))
    by_rank = all_gather(own)
    return [by_rank[i % world()][i // world()] for i in range(len(parts))]


def run_together(work: Iterator[object]) -> None:
    """Exhaust each rank's own iterator; return when all ranks have done so.

    The ranks exchange every few seconds who is done, and none waits for another's whole work: a collective
    fails after ``TIMEOUT``.
    """
    is_done = False
    while not is_done:
        end = time.monotonic() + EXCHANGE_SECONDS
        is_exhausted = all(time.monotonic() < end for _ in work)
        is_done = all(all_gather(is_exhausted))


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over the ranks, added in float32.

    A missing gradient counts as zero; a parameter without one on any rank keeps none.
    """
    if world() == 1:
        return
    unsharded = [p for p in parameters if not isinstance(p, DTensor)]  # FSDP sums the others
    present = all_reduce([float(p.grad is not None) for p in unsharded])
    for bucket in _buckets([p for p, count in zip(unsharded, present, strict=True) if count]):
        flat = torch.cat([_float32_gradient(p).flatten() for p in bucket])
        dist.all_reduce(flat)
        for parameter, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)


def _float32_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters in order, in buckets of one dtype and device and about ``BUCKET`` bytes."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and (
            (parameter.dtype, parameter.device) != (bucket[0].dtype, bucket[0].device)
            or 4 * sum(p.numel() for p in bucket) >= BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def all_reduce(values: Sequence[float]) -> list[float]:
    """Return the sum over the ranks of each value."""
    if world() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    sums: list[float] = total.tolist()
    return sums


def check_equal(value: T, what: str) -> T:
    """Return ``value``.

    Raises InputError if another rank has another one; ``what`` names it in the message.
    """
    if any(other != value for other in all_gather(value)):
        raise InputError(
            f"The processes of this run see different {what}: its folder and its inputs must be the same "
            "files on every node."
        )
    return value


def barrier() -> None:
    """Wait until every rank has called this."""
    all_reduce([0.0])


def from_first(compute: Callable[[], T]) -> T:
    """Return what the first rank computes, on all ranks."""
    found: list[Any] = [compute() if is_first() else None]
    if world() > 1:
        dist.broadcast_object_list(found)
    value: T = found[0]
    return value


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values
