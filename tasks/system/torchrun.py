"""Whether this process works alone or is one of several that torchrun started on the same folder. Without torch: every program asks."""

import os


class PeersLost(RuntimeError):
    """Another process of this run has ended. Why is known to it, and to whoever started them all."""


def rank() -> int:
    """Which of the processes this is, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Which of this machine's processes this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """How many there are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0
