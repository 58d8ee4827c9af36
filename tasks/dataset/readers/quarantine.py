"""Record every row that cannot be used, with its place and the reason."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tasks.system.errors import InputError


class Place(NamedTuple):
    """The place of a row in the source."""

    file: str
    row: int  # from 1: a line of JSON lines, an element of a list, a row of a table or a dump


RejectRow = Callable[[Place, str], None]  # called with place and reason of every row that cannot be used
MOST_REASONS = 100  # counted separately: a reason may quote a name from the rows
OTHER_REASONS = "rows that cannot be used for other reasons"
LONGEST_NAME = 40
MOST_NAMED = 12  # columns in a sentence


class UnusableRow(Exception):
    """Raised for a row that cannot be used, with the reason."""


class ExcludedRow(Exception):
    """Raised for a valid row that a rule leaves out, with the reason."""


def quote(name: str) -> str:
    """Return a column's name in quotes for a sentence, clipped and without unprintable characters."""
    clipped = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return "'" + "".join(character if character.isprintable() else "�" for character in clipped) + "'"


class Quarantine:
    """Counts rows that cannot be used and writes them to a file, if a path is given.

    Valid rows that a rule leaves out are counted elsewhere.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.reasons: Counter[str] = Counter()
        self.first = ""
        self.rows = 0  # of the source, good and bad; the reader counts them here
        self.file = path.open("w", encoding="utf-8") if path else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file:
            self.file.close()

    def __call__(self, place: Place, reason: str) -> None:
        """Record a row."""
        has_counter = reason in self.reasons or len(self.reasons) < MOST_REASONS
        self.reasons[reason if has_counter else OTHER_REASONS] += 1
        self.first = self.first or f"{place.file}, row {place.row}"
        if self.file:
            self.file.write(json.dumps({**place._asdict(), "reason": reason}, ensure_ascii=False) + "\n")

    def check(self, source: Path, most: float, *, columns: Sequence[str] = ()) -> None:
        """Raise InputError if more than the share ``most`` of the rows cannot be used.

        ``columns`` are names of columns of such rows, to be shown.
        """
        if (bad := self.reasons.total()) > most * self.rows:
            why = ", ".join(f"{count} {reason}" for reason, count in self.reasons.most_common(3))
            remedy = "give other data, or raise data.max_bad_share"
            if bad == self.rows:
                remedy = "give other data, or name its columns in source"
            if columns:
                others = " and others" if len(columns) > MOST_NAMED else ""
                remedy += f" (these rows have {', '.join(columns[:MOST_NAMED])}{others})"
            raise InputError(
                f"{bad} of {self.rows} rows of {source} cannot be used "
                f"({why}; the first: {self.first}): {remedy}."
            )
