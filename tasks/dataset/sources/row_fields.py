"""Read the columns of one of a user's own rows, and remember which columns were read and what was unusual."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tasks.dataset.readers.quarantine import LONGEST_NAME, UnusableRow, quote
from tasks.dataset.sources.chat_messages import read_text
from tasks.dataset.sources.column_meanings import Columns, find_value, is_missing
from tasks.dataset.sources.row_warnings import RowWarnings


class RowFields:
    """The values of a row, with the columns that have been read.

    What is unusual is counted in ``warnings`` only by ``count_warnings``, once the row has turned out to be
    usable.
    """

    def __init__(self, fields: Mapping[str, Any], columns: Columns, warnings: RowWarnings) -> None:
        self.fields, self.columns, self.warnings = fields, columns, warnings
        self.read = {name.partition(".")[0] if name not in fields else name for name in columns.ignored}
        self._pending: dict[tuple[int, str], Counter[str]] = {}  # once per row however many answers it has
        self._prompt_parts: dict[str, str] = {}  # texts that are added to the prompt, by column

    def get(self, column: str) -> Any:
        """Return the value of a column and mark it as read; None if it is missing."""
        value = find_value(self.fields, column)
        if value is not None:
            self.read.add(column if column in self.fields else column.partition(".")[0])
        return value

    def have(self, *columns: str) -> bool:
        """Return whether the row has a value in each of the columns."""
        return all(find_value(self.fields, column) is not None for column in columns)

    def label(self, column: str) -> Any:
        """Return the value of a label's column. Raises UnusableRow if it is missing."""
        value = self.get(column)
        if value is None:
            raise UnusableRow(
                f"rows without a label (column {quote(column)}; list it in source.ignored if it is none)"
            )
        return value

    def prompt_part(self, name: str) -> str:
        """Return the text of a column that is added to the prompt; "" if it was read as something else."""
        if name not in self._prompt_parts:
            value = None if name in self.read else self.get(name)
            self._prompt_parts[name] = "" if value is None else _read_plain_text(value, name)
        return self._prompt_parts[name]

    def warn(self, counter: Counter[str], name: str) -> None:
        """Count ``name`` in one of the warnings' counters if the row can be used."""
        self._pending[id(counter), name] = counter

    def count_warnings(self) -> None:
        """Count what is unusual about the row, and its columns that were not read."""
        for (_, name), counter in self._pending.items():
            counter[name] += 1
        for name in self.unread():
            is_plain = name.isidentifier() and len(name) < LONGEST_NAME
            self.warnings.unread[name if is_plain else quote(name)[1:-1]] += 1

    def unread(self) -> dict[str, Any]:
        """Return the values of the columns that have not been read."""
        return {
            name: value
            for name, value in self.fields.items()
            if name not in self.read and not is_missing(value)
        }


def _read_plain_text(value: Any, name: str) -> str:
    is_list = isinstance(value, list) and all(isinstance(part, str) for part in value)
    if is_list:  # passages; an empty list is an empty text
        return "\n\n".join(part.strip() for part in value).strip()
    text = str(value) if isinstance(value, int | float) else read_text(value, name)
    if not isinstance(text, str):
        raise UnusableRow(f"rows with messages where a text is wanted (column {quote(name)})")
    return text
