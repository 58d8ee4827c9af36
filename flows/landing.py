"""Tells the Prefect server that data has landed; the deployments of the flow retrain start on it."""

from pathlib import Path

from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from tasks.programs.config import InputError

EVENT = "alignflow.data.landed"


def land(dump: Path) -> None:
    """Say that ``dump`` is there, under its absolute path: workers run in other folders. Raises InputError."""
    if not dump.is_file():
        raise InputError(f"There is no file {dump}")
    path = str(dump.resolve())
    emit_event(EVENT, resource={"prefect.resource.id": "alignflow.data.dump", "path": path})
    EventsWorker.instance().drain()
