"""Tells the Prefect server that data has landed for a profile; its deployment of the flow retrain starts on it."""

from pathlib import Path

from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from tasks.programs.config import InputError

EVENT = "alignflow.data.landed"


def land(profile: str, dump: Path) -> None:
    """Say that ``dump`` is there for a profile, under its absolute path: workers run in other folders. Raises InputError."""
    if not dump.exists():
        raise InputError(f"There is no file or folder {dump}")
    path = str(dump.resolve())
    emit_event(EVENT, resource={"prefect.resource.id": f"alignflow.data.{profile}", "path": path})
    EventsWorker.instance().drain()
