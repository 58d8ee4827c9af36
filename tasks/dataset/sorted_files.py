"""Write record batches to Arrow files sorted by key, and read any range of keys from many such files.

This is how data that does not fit into memory is grouped by key, the first column, 0 <= key < 2^63.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.system.files import replacing

SAMPLE_EVERY = 32  # one of so many keys of a file is sampled to find ranges of equal size
Indices = NDArray[np.int64]


class Slice(NamedTuple):
    """A range of rows of a sorted file."""

    path: Path
    start: int
    end: int


def write(records: pa.RecordBatch, path: Path) -> None:
    """Sort the records and write them; records of one key stay in their order."""
    records = records.take(pa.array(np.argsort(records.column(0).to_numpy(), kind="stable")))
    with replacing(path) as new, pa.OSFile(str(new), "wb") as file:
        with pa.ipc.new_file(file, records.schema) as writer:
            writer.write_batch(records)


def _open(path: Path) -> pa.RecordBatch:
    """Return the records of a file as a view of the mapped file: only what is used is read."""
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def partition(paths: Sequence[Path], size: int, num_bytes: int) -> list[list[Slice]]:
    """Return slices of the files for rising ranges of keys.

    A range has about ``size`` records, or fewer if their texts have more than about ``num_bytes``. Every
    record is in exactly one slice, and all records of a key are in one range.
    """
    borders = _borders(paths, size, num_bytes)
    partitions: list[list[Slice]] = [[] for _ in range(len(borders) + 1)]
    for path in paths:
        keys = _open(path).column(0).to_numpy()
        rows = [0, *np.searchsorted(keys, borders).tolist(), len(keys)]
        for number, (start, end) in enumerate(pairwise(rows)):
            if start < end:
                partitions[number].append(Slice(path, start, end))
    return [slices for slices in partitions if slices]


def _borders(paths: Sequence[Path], size: int, num_bytes: int) -> Indices:
    """Return the first key of every range but the first."""
    samples = [_sample(path, size, num_bytes) for path in paths]
    if not samples:
        return np.empty(0, dtype=np.int64)
    keys, costs = (np.concatenate(columns) for columns in zip(*samples, strict=True))
    order = np.argsort(keys, kind="stable")
    ranges = np.floor(np.cumsum(costs[order]))  # number of ranges that are full after each sample
    return np.unique(keys[order][1:][np.diff(ranges) > 0])


def _sample(path: Path, size: int, num_bytes: int) -> tuple[Indices, NDArray[np.float64]]:
    """Return one of SAMPLE_EVERY keys, and which part of a range it and those up to the next one fill."""
    records = _open(path)
    firsts = np.arange(0, len(records), SAMPLE_EVERY)
    ends = np.minimum(firsts + SAMPLE_EVERY, len(records))
    costs = (ends - firsts) / size
    for offsets in _text_offsets(records):
        costs += (offsets[ends] - offsets[firsts]) / num_bytes
    return records.column(0).to_numpy()[firsts], costs


def _text_offsets(records: pa.RecordBatch) -> Iterator[Indices]:
    """Yield for each column of large texts, also in lists of structs, where the bytes of each row [n] start,
    and the end of the last.
    """
    for column in records.columns:
        if pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type):
            yield np.frombuffer(column.buffers()[1], dtype=np.int64, count=len(column) + 1)
        elif pa.types.is_large_list(column.type) and pa.types.is_struct(column.type.value_type):
            starts = column.offsets.to_numpy()
            for offsets in _text_offsets(pa.RecordBatch.from_struct_array(column.values)):
                yield offsets[starts]


def read(slices: Sequence[Slice]) -> pa.RecordBatch:
    """Return the records of a range, file after file."""
    return pa.concat_batches([_open(path).slice(start, end - start) for path, start, end in slices])
