"""Read torchrun's variables: the rank of this process and the number of processes. Does not import torch."""

import os


class PeersLost(RuntimeError):
    """Another process of this run has ended. It has reported the reason itself."""


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world() -> int:
    """Return the number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_first() -> bool:
    """Return whether this is the process that writes files."""
    return rank() == 0
