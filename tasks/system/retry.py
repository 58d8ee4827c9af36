"""Retry a call during an outage of the server it asks."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(
    call: Callable[[], T], *, is_outage: Callable[[Exception], bool], patience: float, pause: float
) -> T:
    """Return what ``call`` returns; while it raises an outage, try again every ``pause`` seconds for ``patience`` seconds.

    An exception that is no outage, and the last one once patience has run out, is raised.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return call()
        except Exception as error:
            if not is_outage(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause)
