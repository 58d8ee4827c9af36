"""Read items of token ids from batches of Arrow columns; only those in use become Python objects."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

T = TypeVar("T")


class TokenTable(Sequence[T], Generic[T]):
    """A sequence of items, or some of them in an order of their own; a slice is another table."""

    def __init__(
        self,
        batches: list[pa.RecordBatch],
        decode: Callable[[pa.RecordBatch], list[T]],
        rows: NDArray[np.int64] | None = None,
    ) -> None:
        self._batches, self._decode = batches, decode
        self._starts = np.cumsum([0, *map(len, batches)])
        self._rows = np.arange(self._starts[-1]) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> "TokenTable[T]": ...

    def __getitem__(self, index: int | slice) -> "T | TokenTable[T]":
        if isinstance(index, slice):
            return self._with_rows(self._rows[index])
        row = int(self._rows[index])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._decode(self._batches[number].slice(row - int(self._starts[number]), 1))[0]

    def __iter__(self) -> Iterator[T]:
        numbers = np.searchsorted(self._starts, self._rows, side="right") - 1
        changes = np.flatnonzero(np.diff(numbers)) + 1  # items from one batch are decoded together
        for part in np.split(np.arange(len(self._rows)), changes):
            if len(part):
                number = int(numbers[part[0]])
                rows = pa.array(self._rows[part] - self._starts[number])
                yield from self._decode(self._batches[number].take(rows))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> "TokenTable[T]":
        """Return the items with these indices, in this order."""
        return self._with_rows(self._rows[np.asarray(indices, dtype=np.int64)])

    def column(self, name: str) -> list[Any]:
        """Return a column's values for the items, without decoding the others."""
        values = [value for batch in self._batches for value in batch[name].to_pylist()]
        return [values[row] for row in self._rows.tolist()]

    def lengths(self, name: str) -> list[int]:
        """Return the length of each item's list in a column."""
        found = [np.diff(batch[name].offsets.to_numpy()) for batch in self._batches if len(batch)]
        lengths: list[int] = np.concatenate([np.zeros(0, dtype=np.int64), *found])[self._rows].tolist()
        return lengths

    def nested_lengths(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the lengths of the lists in the items' lists, one after another, and each item's number."""
        inner, counts = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for batch in filter(len, self._batches):
            outer = batch[name].offsets.to_numpy()
            counts.append(np.diff(outer))
            inner.append(np.diff(batch[name].values.offsets.to_numpy())[outer[0] : outer[-1]])
        of_rows = np.concatenate(counts)
        starts = np.cumsum(of_rows) - of_rows
        chosen = of_rows[self._rows]
        places = np.arange(chosen.sum()) + np.repeat(starts[self._rows] - np.cumsum(chosen) + chosen, chosen)
        return np.concatenate(inner)[places], chosen

    def _with_rows(self, rows: NDArray[np.int64]) -> "TokenTable[T]":
        return TokenTable(self._batches, self._decode, rows)


def to_lists(array: pa.ListArray) -> list[list[Any]]:
    """Return the lists of an array without nulls; of numbers about ten times as fast as its to_pylist."""
    if not len(array):
        return []
    offsets = array.offsets.to_pylist()
    values = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    if pa.types.is_list(values.type):
        flat: list[Any] = to_lists(values)
    elif pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        flat = values.to_numpy().tolist()
    else:
        flat = values.to_pylist()
    first = offsets[0]
    return [flat[a - first : b - first] for a, b in pairwise(offsets)]
