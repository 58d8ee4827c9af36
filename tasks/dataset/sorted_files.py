"""Write records to files sorted by key, and read any range of keys from many such files.

This is how data that does not fit into memory is grouped by key. A sorted file is lines of JSON in the order
of their keys; a file beside it (.npy) has the keys and the offset at which each line ends.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from tasks.system.files import replacing

SAMPLE_EVERY = 32  # one of so many keys of a file is sampled to find ranges of equal size
Record = tuple[int, Any]  # key, 0 <= key < 2^63; what orjson can write


class Slice(NamedTuple):
    """A range of bytes of a sorted file."""

    path: Path
    start: int
    end: int


def write(records: list[Record], path: Path) -> None:
    """Sort the records in place and write them; records of one key stay in their order."""
    records.sort(key=itemgetter(0))
    lines = [orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE) for record in records]
    index = np.empty((2, len(lines)), dtype=np.int64)
    index[0] = [key for key, _ in records]
    index[1] = np.cumsum([len(line) for line in lines], dtype=np.int64)
    with replacing(path.with_suffix(".npy")) as new, new.open("wb") as file:
        np.save(file, index)
    with replacing(path) as new:
        new.write_bytes(b"".join(lines))


def partition(paths: Sequence[Path], size: int) -> list[list[Slice]]:
    """Return slices of the files for rising ranges of keys, of about ``size`` records each.

    Every record is in exactly one slice, and all records of a key are in one range.
    """
    borders = _borders(paths, size)
    partitions: list[list[Slice]] = [[] for _ in range(len(borders) + 1)]
    for path in paths:
        keys, ends = np.load(path.with_suffix(".npy"))
        first_lines = np.concatenate([[0], np.searchsorted(keys, borders), [len(keys)]])
        offsets = np.concatenate([[0], ends])[first_lines].tolist()
        for number, (start, end) in enumerate(pairwise(offsets)):
            if start < end:
                partitions[number].append(Slice(path, start, end))
    return [slices for slices in partitions if slices]


def _borders(paths: Sequence[Path], size: int) -> NDArray[np.int64]:
    """Return the first key of every range but the first."""
    samples = [np.load(path.with_suffix(".npy"), mmap_mode="r")[0, ::SAMPLE_EVERY] for path in paths]
    keys = np.sort(np.concatenate(samples)) if samples else np.empty(0, dtype=np.int64)
    step = max(size // SAMPLE_EVERY, 1)
    return np.unique(keys[step::step])


def read(slices: Sequence[Slice]) -> Iterator[Record]:
    """Yield the records of a range, file after file."""
    for path, start, end in slices:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
            assert len(content) == end - start, f"{path} is shorter than its index says"
            for line in content.splitlines():
                key, value = orjson.loads(line)
                yield key, value
