"""What was odd about a source's rows, columns and files, though they were read: for the data card, and as warnings."""

from collections.abc import Iterator, Mapping
from typing import Any

from tasks.config.sources import OwnRows, Source
from tasks.dataset.sources.row_warnings import RowWarnings

MOST_NAMES = 100  # of columns and files in the card


def warnings(seen: RowWarnings, source: Source, *, rows: int) -> Iterator[str]:
    """Yield a sentence for everything that makes the rows worth less than their user thinks."""
    for columns, count in sorted(seen.opposed.items()):
        yield (
            f"{count} of {rows} rows have scores ({columns}) that say the opposite of their comparison: "
            "if source.chosen is not always the better side, name the column that says which is in source.label."
        )
    if isinstance(source, OwnRows):
        defaults = {OwnRows.model_fields["system"].default, *OwnRows.model_fields["context"].default}
        named = [("system", source.system), *(("context", name) for name in source.context)]
        for setting, name in named:
            if name not in defaults and name not in seen.added:
                yield f"source.{setting}: no prompt was joined to a column {name!r}: no row has it, or its text is in the prompt."


def card_columns(seen: RowWarnings, tests: Mapping[str, int], *, rows: int) -> dict[str, Any]:
    """Return the part of card.json about columns and test files; ``tests`` has the rows of each such file."""
    few = seen.most_common(MOST_NAMES)
    alone = sum(tests.values()) == rows  # a test set alone is split like any other
    return {
        "test_files": {} if alone else dict(sorted(tests.items())[:MOST_NAMES]),
        "unread_columns": _sort(few.unread),
        "added_columns": _sort(few.added),
        "opposed": _sort(few.opposed),
        "noticed": _sort(few.noticed),
    }


def _sort(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))
