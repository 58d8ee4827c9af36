"""Keep a child's output in a log file that does not grow without end."""

import logging
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import IO

MAX_BYTES = 5_000_000
BACKUPS = 2
LONGEST_LINE = 65_536
PATIENCE = 2.0  # seconds for the last lines; a grandchild may hold the pipe open for longer


class RotatedLog:
    """A thread that writes the lines of a pipe to a rotated file.

    No other process writes the file, so this one may rotate it.
    """

    def __init__(self, pipe: IO[bytes], log: Path) -> None:
        self.pipe = pipe
        self.handler = RotatingFileHandler(
            log, maxBytes=MAX_BYTES, backupCount=BACKUPS, encoding="utf-8", delay=True
        )
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        with self.pipe:
            while line := self.pipe.readline(LONGEST_LINE):
                text = line.decode(errors="replace").rstrip("\n")
                self.handler.handle(
                    logging.makeLogRecord({"msg": text})
                )  # on a full disk lines are lost; the pipe goes on being read

    def finish(self) -> None:
        """Wait for the last lines of the child."""
        self.thread.join(PATIENCE)
        if not self.thread.is_alive():
            self.handler.close()
