"""Rows that cannot be used: each is written down with its place and the reason, counted, and never just gone."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tasks.system.errors import InputError


class Place(NamedTuple):
    """Where a row stands."""

    file: str
    row: int  # from 1: a line of JSON lines, an element of a list, a row of a table or a dump


RejectRow = Callable[[Place, str], None]  # is told of every row that cannot be used
MOST_REASONS = 100  # that are counted apart: a reason may quote a name from the rows
OTHER_REASONS = "rows that cannot be used for other reasons"
LONGEST_NAME = 40
MOST_NAMED = 12  # columns in a sentence


class UnusableRow(Exception):
    """Why a row cannot be used."""


class ExcludedRow(Exception):
    """Why a row is left out by a rule, though nothing is wrong with it."""


def quote(name: str) -> str:
    """Return a column's name for a sentence: it may be of any length, and hold anything."""
    clipped = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return "'" + "".join(character if character.isprintable() else "�" for character in clipped) + "'"


class Quarantine:
    """Called for every such row; what a rule leaves out on purpose is not its business. Without a path nothing is written."""

    def __init__(self, path: Path | None = None) -> None:
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self.rows = 0  # of the source, good and bad: whoever reads them counts here
        self.file = path.open("w", encoding="utf-8") if path else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file:
            self.file.close()

    def __call__(self, place: Place, reason: str) -> None:
        few = reason in self.reasons or len(self.reasons) < MOST_REASONS
        self.reasons[reason if few else OTHER_REASONS] += 1
        self.first = self.first or f"{place.file}, row {place.row}"
        if self.file:
            self.file.write(json.dumps({**place._asdict(), "reason": reason}, ensure_ascii=False) + "\n")

    def check(self, source: Path, most: float, *, columns: Sequence[str] = ()) -> None:
        """Raise InputError when a larger share than ``most`` of the rows is here. ``columns`` are the names that such rows have."""
        if (bad := self.reasons.total()) > most * self.rows:
            why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(3))
            remedy = (
                "give other data, or raise data.max_bad_share"
                if bad < self.rows
                else "give other data, or name its columns in source"
            )
            if columns:
                remedy += f" (these rows have {', '.join(columns[:MOST_NAMED])}{' and others' if len(columns) > MOST_NAMED else ''})"
            raise InputError(
                f"{bad} of {self.rows} rows of {source} cannot be used ({why}; the first: {self.first}): {remedy}."
            )
