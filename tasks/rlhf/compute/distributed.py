"""Several processes that train one model, each on its part of every optimizer step.

Every rank knows the whole step: what a loss is divided by counts all rows, so the step's loss and gradients are the sums of the ranks' own. Small
values travel by gloo, tensors on a GPU by NCCL. Sums come out alike on every rank to the last bit, and with them whatever is decided by them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    "sum_gradients",
    "world",
]

TIMEOUT = timedelta(
    minutes=30
)  # for ranks that are late; one that has died is noticed at once, by torchrun and by its closed connections
BUCKET = 64 << 20  # bytes of gradients that travel together

T = TypeVar("T")
Rows = TypeVar("Rows", Tensor, list[Any])


@contextmanager
def process_group() -> Iterator[None]:
    """The block runs on every rank or, in the end, on none. Raises PeersLost where another rank has died."""
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
        if isinstance(error, dist.DistError) or "gloo" in str(
            error
        ):  # gloo names its source file, and has no error class of its own
            raise PeersLost(f"Rank {rank()} of {world()} has lost another: {error}") from error
        raise
    dist.destroy_process_group()


def rank_slice(rows: Rows) -> Rows:
    """This rank's part of a step's rows; none where there are fewer rows than ranks."""
    return rows[rank() :: world()]


def padded_steps(parts: Sequence[T], spare: T) -> list[tuple[T, bool]]:
    """``parts`` with True, and then ``spare`` with False until this rank has had as many as every other: sharded weights need all ranks together."""
    most = max(all_gather(len(parts)))
    return [*((part, True) for part in parts), *[(spare, False)] * (most - len(parts))]


def map_over_ranks(
    parts: Sequence[T], compute: Callable[[T], Any], *, told: Callable[[int, int], None] | None = None
) -> list[Any]:
    """What ``compute`` gives for each of ``parts``: each is computed by one rank, and all ranks learn the result. Tensors must be on the CPU.

    Ranks with less to do compute the first part once more, and nobody looks at it: sharded weights need all ranks together. ``told`` is called with
    how many parts are about done, if all ranks are as fast.
    """
    most = -(-len(parts) // world())
    own = []
    for place in range(rank(), most * world(), world()):
        own.append(compute(parts[place] if place < len(parts) else parts[0]))
        if told:
            told(min(len(own) * world(), len(parts)), len(parts))
    shares = all_gather(own)
    return [shares[i % world()][i // world()] for i in range(len(parts))]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Let every rank have the sum of all ranks' gradients, added in float32; a parameter without one counts as zero, and on all ranks has none."""
    if world() == 1:
        return
    some = [
        p for p in parameters if not isinstance(p, DTensor)
    ]  # those of sharded weights are summed already
    present = all_reduce([float(p.grad is not None) for p in some])
    for bucket in _buckets([p for p, count in zip(some, present, strict=True) if count]):
        flat = torch.cat([_float32_gradient(p).flatten() for p in bucket])
        dist.all_reduce(flat)
        for parameter, total in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype)


def _float32_gradient(parameter: nn.Parameter) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, in lots of one type and device and about ``BUCKET`` bytes."""
    lot: list[nn.Parameter] = []
    for parameter in parameters:
        if lot and (
            (parameter.dtype, parameter.device) != (lot[0].dtype, lot[0].device)
            or 4 * sum(p.numel() for p in lot) >= BUCKET
        ):
            yield lot
            lot = []
        lot.append(parameter)
    if lot:
        yield lot


def all_reduce(values: Sequence[float]) -> list[float]:
    """The sum over the ranks of each value."""
    if world() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    found: list[float] = total.tolist()
    return found


def check_equal(value: T, what: str) -> T:
    """``value``, which must be the same on every rank. Raises InputError where it is not."""
    if any(other != value for other in all_gather(value)):
        raise InputError(
            f"The processes of this run see different {what}: its folder and its inputs must be the same files on every node."
        )
    return value


def barrier() -> None:
    """Until every rank has come here."""
    all_reduce([0.0])


def all_gather(value: T) -> list[T]:
    """What each rank gives, by rank."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found
