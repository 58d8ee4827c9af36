"""Retry a call during an outage of the server it asks."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Set while a run is being stopped: threads get no signals, so they wait and retry only until this is set.
stopping = threading.Event()


def retry(
    call: Callable[[], T], *, is_outage: Callable[[Exception], bool], patience: float, pause: float
) -> T:
    """Return what ``call`` returns; during an outage, call it every ``pause`` seconds for ``patience``
    seconds.

    An exception that is no outage is raised, and so is the last one once patience has run out or the run is
    being stopped.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return call()
        except Exception as error:
            if not is_outage(error) or time.monotonic() > deadline or stopping.is_set():
                raise
        stopping.wait(pause)
