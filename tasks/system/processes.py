"""Make a child process die with its parent."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # loaded before any fork


def die_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent dies, for whatever reason.

    Does nothing except on Linux.

    Called between fork and exec (``preexec_fn``) with the parent's pid; without it, by a program that has
    started already. If the parent has died before the call, this process exits.
    """
    if _prctl is None:
        return
    expected = os.getppid() if parent is None else parent
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    is_orphan = parent is None and expected == 1
    if is_orphan or os.getppid() != expected:
        os._exit(1)
