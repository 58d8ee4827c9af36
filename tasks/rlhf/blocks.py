"""Pieces of a source that can be read apart from each other, by whichever process is free."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SIZE = 2**24  # bytes of text in a block


class Block(NamedTuple):
    """Rows of one file that follow each other."""

    path: Path
    file: str  # what places call it
    form: str  # which of the reader's ways to read the content
    content: Any
    read: int  # bytes of the whole source that are read when this block is


def batches(rows: Iterable[tuple[Any, int]], size: int) -> Iterator[list[Any]]:
    """Lists of rows of about ``size`` bytes; a row comes with its own size."""
    batch: list[Any] = []
    held = 0
    for row, weight in rows:
        batch.append(row)
        held += weight
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
