"""Report what happens while a pipeline runs to this process's listeners (screen, log); nothing depends on
them.

Stages that run at the same time report from threads of their own. Listeners hear one event at a time.
"""

import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Kind = Literal[
    "plan",
    "start",
    "wait",
    "resume",
    "step",
    "built",
    "reused",
    "failed",
    "not_run",
    "warning",
    "log",
    "round",
    "round_end",
]


class Event(NamedTuple):
    """An event of a pipeline.

    ``kind`` says what ``about`` holds: a line of metrics, an artifact, a text, log lines, a round's number.
    """

    kind: Kind
    stage: str
    about: dict[str, Any]


_listeners: list[Callable[[Event], None]] = []
_one_at_a_time = threading.RLock()


def listen(listener: Callable[[Event], None]) -> Callable[[], None]:
    """Call ``listener`` on every event from now on; return the function that ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def tell(kind: Kind, stage: str = "", **about: Any) -> None:
    """Report an event to all listeners."""
    with _one_at_a_time:
        for listener in list(_listeners):
            listener(Event(kind, stage, about))
