"""Test the heartbeats that a flow run sends while its state changes."""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from uuid import uuid4

import httpx
import pytest

from flows.services import heartbeat
from flows.services.heartbeat import ALIVE, WAITING

AWAY = httpx.ConnectError("away")


@pytest.mark.parametrize(
    ("states", "told"),
    [
        (
            [True, True, True],
            [ALIVE, ALIVE],
        ),  # the last look is at the end of the block, after which Prefect sets the run's last state
        (
            [True, False, False],
            [ALIVE, WAITING],
        ),  # suspended: its last beat may have reached the server after that, and is taken back
        ([True, False], [ALIVE, WAITING]),  # the block ends at once
        ([False, False], []),
        ([True, False, True, True], [ALIVE, WAITING, ALIVE]),  # resumed
        ([True, AWAY, False, False], [ALIVE, WAITING]),
        ([AWAY, True, AWAY], [ALIVE]),
    ],
)
def test_a_run_beats_while_it_is_running_and_takes_its_last_beat_back_when_it_is_not(
    monkeypatch: pytest.MonkeyPatch, states: list[bool | Exception], told: list[str]
) -> None:
    left, events = list(states), []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if len(left) == 1:
                self.set()
            return self.is_set()

    def look(*_: object) -> bool:
        state = left.pop(0)
        if isinstance(state, Exception):
            raise state
        return state

    emit: Callable[[str, object], None] = lambda event, _: events.append(event)  # noqa: E731
    monkeypatch.setattr(heartbeat, "get_client", lambda **_: nullcontext())
    monkeypatch.setattr(heartbeat, "_is_running", look)
    monkeypatch.setattr(heartbeat, "_emit", emit)
    heartbeat._beat(uuid4(), 0.001, Stop())
    assert (events, left) == (told, [])
