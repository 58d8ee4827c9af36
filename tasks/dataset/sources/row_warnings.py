"""Counts of what was odd about a user's own rows, though most of them could be read."""

from collections import Counter
from typing import NamedTuple


class RowWarnings(NamedTuple):
    """What was odd about the rows, and how many had it."""

    unread: Counter[str]  # by column
    added: Counter[str]  # rows whose column was joined to the prompt, by column
    opposed: Counter[
        str
    ]  # rows whose scores say the opposite of their comparison, by the columns of the scores
    noticed: Counter[str]  # all else, by sentence
    refused: Counter[str]  # rows that cannot be used, by each of their columns
    left_out: Counter[str]  # rows that a rule leaves out, by reason

    @classmethod
    def empty(cls) -> "RowWarnings":
        return cls(*(Counter() for _ in cls._fields))

    def update(self, other: "RowWarnings") -> None:
        for mine, more in zip(self, other, strict=True):
            mine.update(more)

    def most_common(self, count: int) -> "RowWarnings":
        """Return the same with the ``count`` commonest entries of each: names come from the rows, and may be as many."""
        return RowWarnings(
            *(
                Counter(dict(sorted(mine.items(), key=lambda item: (-item[1], item[0]))[:count]))
                for mine in self
            )
        )
