"""Report what happens while a pipeline runs to this process's listeners (screen, log); nothing depends on them.

Stages that run at the same time report from threads of their own. Listeners hear one event at a time.
"""

import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    """``kind`` says what ``about`` holds: the numbers of a step, the artifact of a stage, a text, the last lines of a log."""

    kind: Literal[
        "plan", "start", "wait", "resume", "step", "built", "reused", "failed", "not_run", "warning", "log"
    ]
    stage: str
    about: dict[str, Any]


_listeners: list[Callable[[Event], None]] = []
_one_at_a_time = threading.RLock()


def listen(listener: Callable[[Event], None]) -> Callable[[], None]:
    """Call ``listener`` on every event from now on; gives the function that ends it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def tell(kind: Any, stage: str = "", **about: Any) -> None:
    with _one_at_a_time:
        for listener in list(_listeners):
            listener(Event(kind, stage, about))
