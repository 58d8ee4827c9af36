"""Acquire and test exclusive file locks.

A lock is flock(2) on an open file: the kernel releases it when every descriptor of that open file is closed,
however its processes end. A child that inherits the descriptor (``pass_fds``) holds the lock as well, so it
lasts until both have ended. The library filelock cannot do that: its descriptor is not public, and its
release unlocks the file for the child too.
"""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def acquire(path: Path, *, on_wait: Callable[[], None] = lambda: None) -> IO[bytes]:
    """Wait for the exclusive lock on ``path`` and return the open file, which holds the lock until it is
    closed.

    ``on_wait`` is called once if another process or thread holds the lock.
    """
    while True:
        file = _open(path)
        try:
            if not _try_flock(file):
                on_wait()
                fcntl.flock(file, fcntl.LOCK_EX)
        except BaseException:
            file.close()
            raise
        if _has_name(file):
            return file
        file.close()  # its holder has removed the file before releasing it


def try_acquire(path: Path) -> IO[bytes] | None:
    """Return the open file, which holds the lock until it is closed.

    None if another process or thread holds it.
    """
    while True:
        file = _open(path)
        if not _try_flock(file):
            file.close()
            return None
        if _has_name(file):
            return file
        file.close()


def is_held(path: Path) -> bool:
    """Return whether a process or thread holds the lock on ``path``."""
    try:
        with path.open("rb") as file:
            # shared: two processes that test at the same time must not take each other for a holder
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    return False


def _open(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def _try_flock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_name(file: IO[bytes]) -> bool:
    """Return whether the file still exists: the lock on a removed file excludes no other process."""
    return os.fstat(file.fileno()).st_nlink > 0
