"""Count what is unusual about a user's own rows."""

from collections import Counter
from typing import NamedTuple


class RowWarnings(NamedTuple):
    """Counters of rows with something unusual."""

    unread: Counter[str]  # by column
    added: Counter[str]  # rows whose column was joined to the prompt, by column
    opposed: Counter[str]  # rows whose scores contradict their comparison, by the columns of the scores
    noticed: Counter[str]  # anything else, by sentence
    refused: Counter[str]  # rows that cannot be used, by each of their columns
    left_out: Counter[str]  # rows that a rule leaves out, by reason

    @classmethod
    def empty(cls) -> "RowWarnings":
        """Return counters at zero."""
        return cls(*(Counter() for _ in cls._fields))

    def update(self, other: "RowWarnings") -> None:
        """Add the counts of another block."""
        for mine, more in zip(self, other, strict=True):
            mine.update(more)

    def most_common(self, count: int) -> "RowWarnings":
        """Return the ``count`` most common entries of each counter: rows may have many names."""
        return RowWarnings(*(_most_common(counter, count) for counter in self))


def _most_common(counter: Counter[str], count: int) -> Counter[str]:
    """Return the most common entries; of equal counts the first by name, so that order does not matter."""
    entries = sorted(counter.items(), key=lambda entry: (-entry[1], entry[0]))
    return Counter(dict(entries[:count]))
