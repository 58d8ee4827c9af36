"""Turn counts of unusual rows, columns and files into warnings and fields of the data card."""

from collections.abc import Iterator, Mapping

from tasks.config.sections.sources import OwnRows, Source
from tasks.dataset.card import ColumnsCard
from tasks.dataset.sources.row_warnings import RowWarnings

MOST_NAMES = 100  # of columns and files in the card


def warnings(row_warnings: RowWarnings, source: Source, *, rows: int) -> Iterator[str]:
    """Yield a sentence for everything that makes the rows worth less than their user expects."""
    for columns, count in sorted(row_warnings.opposed.items()):
        yield (
            f"{count} of {rows} rows have scores ({columns}) that say the opposite of their comparison: "
            "if source.chosen is not always the better side, name the column that says which is in "
            "source.label."
        )
    if isinstance(source, OwnRows):
        defaults = {OwnRows.model_fields["system"].default, *OwnRows.model_fields["context"].default}
        settings = [("system", source.system), *(("context", name) for name in source.context)]
        for setting, name in settings:
            if name not in defaults and name not in row_warnings.added:
                yield (
                    f"source.{setting}: no prompt was joined to a column {name!r}: no row has it, "
                    "or its text is in the prompt."
                )


def card_columns(row_warnings: RowWarnings, tests: Mapping[str, int], *, rows: int) -> ColumnsCard:
    """Return the card's fields about columns and test files; ``tests`` has the rows of each file."""
    few = row_warnings.most_common(MOST_NAMES)
    only_tests = sum(tests.values()) == rows  # a source of test sets alone is split like any other
    return {
        "test_files": {} if only_tests else dict(sorted(tests.items())[:MOST_NAMES]),
        "unread_columns": _sort(few.unread),
        "added_columns": _sort(few.added),
        "opposed": _sort(few.opposed),
        "noticed": _sort(few.noticed),
    }


def _sort(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items()))
