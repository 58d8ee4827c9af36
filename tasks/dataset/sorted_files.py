"""Records sorted by a key, in files of which any range of keys is read without the rest: how what does not fit into memory is brought together.

A segment is lines of JSON in the order of their keys, and beside it the keys and where each line ends.
"""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from tasks.system.files import replacing

SAMPLE_EVERY = 32  # of so many keys of a segment one is looked at to find equal ranges
Record = tuple[int, Any]  # key, 0 <= key < 2^63; what orjson can write


class Slice(NamedTuple):
    """Bytes of a segment."""

    path: Path
    start: int
    end: int


def write(records: list[Record], path: Path) -> None:
    """Sorts the records in place; those of one key stay in their order."""
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
    """Every record of the segments once: slices of rising ranges of keys, of about ``size`` records each. A key is in one range."""
    borders = _borders(paths, size)
    found: list[list[Slice]] = [[] for _ in range(len(borders) + 1)]
    for path in paths:
        keys, ends = np.load(path.with_suffix(".npy"))
        at = np.concatenate([[0], ends])[np.concatenate([[0], np.searchsorted(keys, borders), [len(keys)]])]
        for place, (start, end) in enumerate(zip(at[:-1].tolist(), at[1:].tolist(), strict=True)):
            if start < end:
                found[place].append(Slice(path, start, end))
    return [slices for slices in found if slices]


def _borders(paths: Sequence[Path], size: int) -> Any:
    """The first key of every range but the first."""
    looked_at = [np.load(path.with_suffix(".npy"), mmap_mode="r")[0, ::SAMPLE_EVERY] for path in paths]
    keys = np.sort(np.concatenate(looked_at)) if looked_at else np.empty(0, dtype=np.int64)
    step = max(size // SAMPLE_EVERY, 1)
    return np.unique(keys[step::step])


def read(slices: Sequence[Slice]) -> Iterator[Record]:
    """The records of a range, segment after segment."""
    for path, start, end in slices:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
            assert len(content) == end - start, f"{path} is shorter than its index says"
            for line in content.splitlines():
                key, value = orjson.loads(line)
                yield key, value
