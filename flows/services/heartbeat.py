"""Send heartbeats of a flow run while its state is Running, so that the server notices a lost process.

flows/services/automations.py acts on them. Prefect's own heartbeats continue in every state until the process
ends: a run that is suspended, paused or being cancelled would count as lost after the last of them, and one
may follow the last state (issues 18653 and 21932 of https://github.com/PrefectHQ/prefect; seen in 3.9.1).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run

ALIVE, WAITING = "alignflow.flow-run.alive", "alignflow.flow-run.waiting"
BEAT_SECONDS = 30.0
JOIN_SECONDS = 2.0


@contextmanager
def heartbeat(seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Send a heartbeat every ``seconds`` until the block ends."""
    if not flow_run.id:  # the function of a flow, called without Prefect
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=copy_context().run, args=(_beat, UUID(str(flow_run.id)), seconds, stop), daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(JOIN_SECONDS)  # a beat after the run's last state would make it count as lost


def _beat(run_id: UUID, seconds: float, stop: threading.Event) -> None:
    is_expected, is_over = (
        False,
        False,
    )  # whether the server expects another beat; whether the block has ended
    with get_client(sync_client=True) as client:
        while not is_over:
            is_over = stop.is_set()
            with suppress(
                httpx.TransportError, PrefectHTTPStatusError, ObjectNotFound
            ):  # away until the next beat, or the run is deleted
                is_running = _is_running(client, run_id)
                if is_running and not stop.is_set():
                    _emit(ALIVE, run_id)
                    is_expected = True
                elif (
                    not is_running and is_expected
                ):  # events wait in a queue: the last beat may have come after the run was suspended
                    _emit(WAITING, run_id)
                    is_expected = False
            if not is_over:
                stop.wait(seconds)


def _is_running(client: SyncPrefectClient, run_id: UUID) -> bool:
    state = client.read_flow_run(run_id).state
    return state is not None and state.type == StateType.RUNNING


def _emit(event: str, run_id: UUID) -> None:
    emit_event(event, resource={"prefect.resource.id": f"prefect.flow-run.{run_id}"})
