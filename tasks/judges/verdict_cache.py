"""Keep every reply of a paid judge in a file, so that none that was kept is paid for again.

Two runs at the same time share the replies too, except requests that both have on their way at one moment:
those are paid for twice, and the first reply counts.
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tasks.system.errors import InputError, disk_failure
from tasks.system.retry import retry

FORMAT = 2
LOCK_SECONDS = 60.0  # for which another process may hold the file
CHUNK = 500  # keys in one query

_TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, text TEXT NOT NULL, is_complete INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, reply_tokens INTEGER NOT NULL, time REAL NOT NULL
) WITHOUT ROWID
"""


class Reply(NamedTuple):
    """What a judge wrote, and what it is paid for."""

    text: str
    is_complete: bool  # False: it was cut at the most tokens of a reply
    prompt_tokens: int
    reply_tokens: int


def reply_key(
    prompt: str, *, server: str, model: str, temperature: float | None, max_reply_tokens: int
) -> str:
    """Return the key of a reply: the sha256 of all that it depends on.

    ``server`` identifies the endpoint: two servers may call different models by one name.
    """
    degree = None if temperature is None else float(temperature)
    facts = [FORMAT, prompt, server, model, degree, max_reply_tokens]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class VerdictCache:
    """Replies by key, in a SQLite file that threads, processes and runs share.

    The reply is stored rather than its verdict, so that a better parser reads it again without asking again.
    A reply is on the disk when ``write`` returns. Prompts are not stored.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file. Raises InputError if it is no such file, DiskFailure."""
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        self._connection = sqlite3.connect(
            path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            retry(self._prepare, is_outage=_is_locked, patience=LOCK_SECONDS, pause=0.05)
        except sqlite3.Error as error:
            self._connection.close()
            raise disk_failure(error, path.parent) or _unreadable(path, error) from error

    def _prepare(self) -> None:
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute(
            "PRAGMA synchronous = FULL"
        )  # a reply that was paid for survives a power cut
        self._connection.execute(_TABLE)

    def read(self, keys: Iterable[str]) -> dict[str, Reply]:
        """Return the replies that are known, by key. Raises InputError if the file is damaged."""
        wanted, found = list(dict.fromkeys(keys)), {}
        try:
            with self._lock:
                for first in range(0, len(wanted), CHUNK):
                    some = wanted[first : first + CHUNK]
                    marks = ", ".join("?" * len(some))
                    rows = self._connection.execute(
                        "SELECT key, text, is_complete, prompt_tokens, reply_tokens FROM replies "  # noqa: S608
                        f"WHERE key IN ({marks})",
                        some,
                    )
                    for key, text, is_complete, prompt_tokens, reply_tokens in rows:
                        found[key] = Reply(text, bool(is_complete), prompt_tokens, reply_tokens)
        except sqlite3.DatabaseError as error:
            raise _unreadable(self.path, error) from error
        return found

    def write(self, key: str, model: str, reply: Reply) -> None:
        """Write a reply. If another process was first its reply stays, for its run counts that one.

        Raises DiskFailure.
        """
        text = reply.text.encode("utf-8", "replace").decode()  # JSON may hold half a surrogate pair
        row = (key, model, text, reply.is_complete, reply.prompt_tokens, reply.reply_tokens, time.time())
        try:
            with self._lock:
                self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.DatabaseError as error:
            raise disk_failure(error, self.path.parent) or _unreadable(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        self._connection.close()


def _is_locked(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _unreadable(path: Path, error: sqlite3.Error) -> InputError:
    return InputError(
        f"{path} cannot be used ({error}). It keeps the replies of paid judges: if it is damaged, move it "
        "away, and they are asked again"
    )
