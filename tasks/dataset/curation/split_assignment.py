"""What is decided about all questions together: which say the same, whose author has enough of them, and the split of each."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.dataset.curation import question_files
from tasks.dataset.curation.near_duplicates import BANDS, Hashes, group_near_duplicates
from tasks.dataset.curation.question_files import SPLITS, QuestionColumns
from tasks.dataset.splits import choose_splits


class SplitAssignment(NamedTuple):
    """Of n questions in the order of their ids."""

    splits: Any  # int8 [n], a place in SPLITS; 0: left out
    comparable: Any  # bool [n]


def assign_splits(
    paths: Sequence[Path],
    shares: Mapping[str, float],
    dropped: Counter[str],
    *,
    alike: float,
    distinct: bool,
    per_author: int | None,
) -> SplitAssignment:
    """Fates of the questions of all shelves. ``distinct``: of those that say the same only the first is kept. ``dropped`` counts what is not."""
    found = question_files.read_columns(paths)
    leaders = _group_leaders(found, paths, alike)
    kept = np.ones(len(found.ids), dtype=bool)
    if distinct:
        kept = leaders == np.arange(len(leaders))
        dropped["questions that say the same as another"] += int((~kept).sum())
    if per_author:
        fewer = _cap_authors(found, kept, per_author)
        dropped["questions of authors with more than their share"] += int((kept & ~fewer).sum())
        kept &= fewer
    given = {int(place): SPLITS[found.given[place]] for place in np.flatnonzero(found.given)}
    if len(given) == len(found.ids):  # a test set alone is split like any other set
        given = {}
    chosen = choose_splits(found.ids, leaders, shares, given)
    splits = np.fromiter((SPLITS.index(name) for name in chosen), dtype=np.int8, count=len(found.ids))
    splits[~kept] = 0
    return SplitAssignment(splits, found.comparable)


def _group_leaders(found: QuestionColumns, paths: Sequence[Path], alike: float) -> Any:
    """The place of the first question that says the same, by equal words or by nearly equal ones."""
    _, first, back = np.unique(found.texts, return_index=True, return_inverse=True)
    leaders = first[back].astype(np.int64)
    if alike < 1 and len(leaders):
        with _open_shingles(paths) as shingles_of:
            group_near_duplicates(leaders, _Bands(paths), shingles_of, alike)
    return leaders


class _Bands(Sequence[Hashes]):
    """Each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return BANDS

    def __getitem__(self, number: Any) -> Hashes:
        if number >= BANDS:
            raise IndexError
        return question_files.read_band(self.paths, number)


@contextmanager
def _open_shingles(paths: Sequence[Path]) -> Iterator[Callable[[int], Hashes]]:
    """What gives a question's shingles, read when they are asked for."""
    whole, ends = question_files.join_shingles(paths)

    def shingles_of(number: int) -> Hashes:
        start = int(ends[number - 1]) if number else 0
        return np.frombuffer(os.pread(file, 8 * (int(ends[number]) - start), 8 * start), dtype=np.uint64)

    file = os.open(whole, os.O_RDONLY)
    try:
        yield shingles_of
    finally:
        os.close(file)
        whole.unlink()


def _cap_authors(found: QuestionColumns, kept: Any, most: int) -> Any:
    """Whether a question is among the first ``most`` of its author, in an order that the id alone decides; who is unknown is not capped."""
    places = np.flatnonzero(kept & (found.authors != 0))
    draw = (found.ids[places].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    draw = (draw ^ draw >> np.uint64(31)) * np.uint64(0xBF58476D1CE4E5B9)  # as in splitmix64
    order = places[np.lexsort((draw ^ draw >> np.uint64(27), found.authors[places]))]
    authors = found.authors[order]
    starts = (
        np.flatnonzero(np.concatenate([[True], authors[1:] != authors[:-1]]))
        if len(order)
        else np.empty(0, dtype=np.int64)
    )
    ranks = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    fewer = np.ones(len(found.ids), dtype=bool)
    fewer[order[ranks >= most]] = False
    return fewer
