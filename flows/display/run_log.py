"""A pipeline's events as lines of its flow run's log in Prefect's pages."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect import get_run_logger

from flows.display.formatting import format_not_run
from flows.display.progress import Progress
from tasks.system import events
from tasks.system.events import Event

LOG_SECONDS = 10.0  # between two lines of progress


@contextmanager
def logging_events() -> Iterator[None]:
    """While the block runs, write every event into the log of the current flow run."""
    unlisten = events.listen(_RunLog().on_event)
    try:
        yield
    finally:
        unlisten()


class _RunLog:
    """The log of one flow run, and how far the stages at work are."""

    def __init__(self) -> None:
        self.logger = get_run_logger()
        self.progress = Progress()
        self.last: dict[str, float] = {}  # time of the last line of progress, by stage

    def on_event(self, event: Event) -> None:
        about, stage = event.about, event.stage
        self.progress.on_event(event)
        place, now = self.progress.place(stage), time.monotonic()
        match event.kind:
            case "resume":
                self._log(logging.INFO, f"{place} goes on from its checkpoint")
            case "step" if now - self.last.get(stage, 0.0) > LOG_SECONDS:
                self.last[stage] = now
                self._log(logging.INFO, f"{place} {self.progress.at_work[stage].text(about['line'])}")
            case "warning":
                self._log(logging.WARNING, about["text"])
            case "log":
                lines = "\n".join(about["lines"])
                self._log(logging.ERROR, f"The last lines of the log of the stage {stage}:\n{lines}")
            case "built" | "reused":
                self._log(logging.INFO, f"{place} {event.kind}")
            case "failed":
                self._log(logging.ERROR, f"{place} {about.get('how', 'failed')}")
            case "round":
                self._log(logging.INFO, f"Round {about['number']} of {about['count']} begins")
            case "round_end":
                self._log(logging.INFO, f"Round {about['number']}: {about['text']}")
            case "not_run":
                self._log(logging.ERROR, f"{place} {format_not_run(about['causes'])}")

    def _log(self, level: int, text: str) -> None:
        self.logger.log(level, "%s", text)
