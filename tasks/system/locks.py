"""Test locks that other processes hold with flock."""

import fcntl
from pathlib import Path


def is_held(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(
                file, fcntl.LOCK_SH | fcntl.LOCK_NB
            )  # shared: two who ask at once do not take each other for a holder
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
