"""What happens while a pipeline runs, told to whoever listens in this process (the screen): nothing depends on anyone listening."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Event(NamedTuple):
    """``kind`` says what ``about`` holds: the numbers of a step, the artifact of a stage, a text, the last lines of a log."""

    kind: Literal["plan", "start", "wait", "resume", "step", "built", "reused", "failed", "warning", "log"]
    stage: str
    about: dict[str, Any]


_listeners: list[Callable[[Event], None]] = []


def listen(listener: Callable[[Event], None]) -> Callable[[], None]:
    """Call ``listener`` on every event from now on; gives the function that ends it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def tell(kind: Any, stage: str = "", **about: Any) -> None:
    for listener in list(_listeners):
        listener(Event(kind, stage, about))
