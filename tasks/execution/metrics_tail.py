"""Read the lines that a running program appends to its metrics.jsonl."""

import json
import os
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class MetricsTail:
    """Reader of a metrics.jsonl that grows, and that a resumed program replaces by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode, self.offset = 0, 0
        self.seen: set[tuple[Any, ...]] = set()

    def read(self) -> list[Line]:
        """Return the lines that were completed since the last call, without steps returned before."""
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.inode or stat.st_size < self.offset:
                    self.inode, self.offset = stat.st_ino, 0
                file.seek(self.offset)
                content = file.read()
        except FileNotFoundError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self.offset += len(complete)
        lines = map(_parse, complete.splitlines())
        return [line for line in lines if line and self._is_new(line)]

    def _is_new(self, line: Line) -> bool:
        if "phase" in line:  # a resumed program does not keep them, and the same phase may come again
            return True
        mark = (line.get("step"), *sorted(line))
        is_new = mark not in self.seen
        self.seen.add(mark)
        return is_new


def _parse(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:  # a killed program left half a line, and the next one's text follows it
        return None
    return line if isinstance(line, dict) else None
