"""Keep the labels of a round's pairs in an append-only log of JSON lines.

A label is never changed or deleted: withdrawing it appends a row with the same id. Several processes may
append at the same time. A killed one can leave a torn last line, which the next one cuts off.
"""

import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from uuid import uuid4

from tasks.artifacts.store import home
from tasks.system.errors import InputError
from tasks.system.locks import acquire

Side = Literal["first", "second"]
Verdict = Literal["first", "second", "tie", "both_bad", "skip"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
SKIP = "skip"
LOG = "labels.jsonl"
PEOPLE = "people"


class Label(NamedTuple):
    """A row of the log, in the columns of the rounds' table of labels (tasks/programs/rounds)."""

    label_id: str
    pair_id: str
    verdict: str
    rater: str
    source: str = PEOPLE
    time: str = ""  # UTC, ISO 8601
    seconds: float | None = None  # from the pair's appearing to the verdict
    shown_first: str = "first"  # the answer that stood on the left
    withdrawn: bool = False
    why: str = ""  # it was withdrawn


def new_label(
    pair_id: str, verdict: str, rater: str, *, seconds: float | None = None, shown_first: str = "first"
) -> Label:
    """Return a label of this moment with an id of its own."""
    return Label(uuid4().hex, pair_id, verdict, rater, PEOPLE, utc_now(), seconds, shown_first)


def utc_now() -> str:
    """Return the time as text, with microseconds, so that texts sort as times do."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def label_folder(asked_key: str) -> Path:
    """Return the folder for the labels of the pairs that the artifact with this key asks about."""
    return home() / "labels" / asked_key


def append_rows(folder: Path, rows: Sequence[Label]) -> None:
    """Append rows to the folder's log and flush them to the disk."""
    text = "".join(f"{format_row(row)}\n" for row in rows).encode()
    with acquire(folder / "labels.lock"):
        descriptor = os.open(folder / LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _cut_torn_line(descriptor)
            while text:  # a write may be shorter than asked for
                text = text[os.write(descriptor, text) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cut_torn_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.ftruncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)


def format_row(row: Label) -> str:
    """Return a row as one line of JSON."""
    return json.dumps(row._asdict(), ensure_ascii=False)


def read_rows(path: Path) -> list[Label]:
    """Return all rows of a log, without a torn last line; none if there is no file.

    Raises InputError if a line is no row.
    """
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    return [_parse_line(line, number, path) for number, line in enumerate(lines, start=1)]


def _parse_line(line: bytes, number: int, path: Path) -> Label:
    try:
        content: dict[str, Any] = json.loads(line)
        return Label(**content)
    except (ValueError, TypeError):
        raise InputError(f"Line {number:,} of {path} is no label: {line[:60]!r}") from None


def apply_withdrawals(rows: Iterable[Label]) -> list[Label]:
    """Return the labels that hold, in the order of their times: each once, without withdrawn ones."""
    rows = list(rows)
    withdrawn = {row.label_id for row in rows if row.withdrawn}
    held = {row.label_id: row for row in rows if row.label_id not in withdrawn}
    return sorted(held.values(), key=lambda row: (row.time, row.label_id))


def read_labels(folder: Path) -> list[Label]:
    """Return the labels of a folder's log that hold, in the order of their times. Raises InputError."""
    return apply_withdrawals(read_rows(folder / LOG))


def add_missing_rows(folder: Path, rows: Iterable[Label]) -> list[Label]:
    """Append the rows that the folder's log does not have, and return these."""
    known = {(row.label_id, row.withdrawn) for row in read_rows(folder / LOG)}
    missing = [row for row in rows if (row.label_id, row.withdrawn) not in known]
    if missing:
        append_rows(folder, missing)
    return missing


def withdraw(folder: Path, labels: Sequence[Label], *, why: str, by: str) -> None:
    """Withdraw labels; ``by`` is who does it."""
    now = utc_now()
    append_rows(folder, [one._replace(withdrawn=True, why=why, rater=by, time=now) for one in labels])


def count_labelled(labels: Iterable[Label], asked: Iterable[str], *, with_skipped: bool) -> int:
    """Return how many of the pairs ``asked`` (ids) have a label; skipped ones count if that is wanted."""
    labelled = {one.pair_id for one in labels if with_skipped or one.verdict != SKIP}
    return len(labelled & set(asked))
