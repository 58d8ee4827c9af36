"""Tell the Prefect server that the labels of a suspended run are in: an automation resumes it."""

import logging
import os
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events import emit_event
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound

from flows.services.automations import LABELS_IN


def announce_labels(flow_run: str) -> bool:
    """Emit the event for a run that is suspended; return whether it was.

    A run that is not suspended finds the labels by itself, and one that no server knows was started by a
    command, which its user starts again.
    """
    if not flow_run or not os.environ.get("PREFECT_API_URL"):
        return False
    with get_client(sync_client=True) as client:
        try:
            state = client.read_flow_run(UUID(flow_run)).state
        except ObjectNotFound:
            return False
    if state is None or state.type != StateType.PAUSED:
        return False
    # without a handler, the worker prints how many events it still has to send
    logging.getLogger(EventsWorker.__name__).addHandler(logging.NullHandler())
    emit_event(LABELS_IN, resource={"prefect.resource.id": f"prefect.flow-run.{flow_run}"})
    EventsWorker.instance().drain()
    return True
