"""Decide what needs all questions together: near duplicates, the limit per author, and splits.

Only numbers of the questions are in memory, not their texts.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.dataset.curation import question_files
from tasks.dataset.curation.near_duplicates import BANDS, Hashes, Indices, group_near_duplicates
from tasks.dataset.curation.question_files import SPLITS, QuestionNumbers
from tasks.dataset.splits import choose_splits


class SplitAssignment(NamedTuple):
    """The splits of n questions in the order of their ids."""

    splits: NDArray[np.int8]  # [n], index into SPLITS; 0: dropped
    comparable: NDArray[np.bool_]  # [n], whether two of the answers can be compared


def assign_splits(
    paths: Sequence[Path],
    shares: Mapping[str, float],
    dropped: Counter[str],
    *,
    alike: float,
    distinct: bool,
    per_author: int | None,
) -> SplitAssignment:
    """Return the split of every question of all files.

    With ``distinct`` only the first of near duplicates is kept; ``per_author`` is the most questions that are
    kept of an author. ``dropped`` counts the others by reason.
    """
    columns = question_files.read_numbers(paths)
    leaders = _group_leaders(columns, paths, alike)
    kept = np.ones(len(columns.ids), dtype=bool)
    if distinct:
        kept = leaders == np.arange(len(leaders))
        dropped["questions that say the same as another"] += int((~kept).sum())
    if per_author:
        within_cap = _cap_authors(columns, kept, per_author)
        dropped["questions of authors with more than their share"] += int((kept & ~within_cap).sum())
        kept &= within_cap
    source_splits = columns.source_splits
    given = {int(index): SPLITS[source_splits[index]] for index in np.flatnonzero(source_splits)}
    if len(given) == len(columns.ids):  # a test set alone is split like any other set
        given = {}
    chosen = choose_splits(columns.ids, leaders, shares, given)
    splits = np.fromiter((SPLITS.index(name) for name in chosen), dtype=np.int8, count=len(columns.ids))
    splits[~kept] = 0
    return SplitAssignment(splits, columns.comparable)


def _group_leaders(columns: QuestionNumbers, paths: Sequence[Path], alike: float) -> Indices:
    """Return for each question the index of the first with equal or nearly equal words."""
    _, first, back = np.unique(columns.prompts, return_index=True, return_inverse=True)
    leaders = first[back].astype(np.int64)
    if alike < 1 and len(leaders):
        with _open_shingles(paths) as shingles_of:
            bands = (question_files.read_band(paths, number) for number in range(BANDS))
            group_near_duplicates(leaders, bands, shingles_of, alike)
    return leaders


@contextmanager
def _open_shingles(paths: Sequence[Path]) -> Iterator[Callable[[int], Hashes]]:
    """Yield a function that reads a question's shingles from disk."""
    path, ends = question_files.join_shingles(paths)

    def shingles_of(number: int) -> Hashes:
        start = int(ends[number - 1]) if number else 0
        return np.frombuffer(os.pread(file, 8 * (int(ends[number]) - start), 8 * start), dtype=np.uint64)

    file = os.open(path, os.O_RDONLY)
    try:
        yield shingles_of
    finally:
        os.close(file)
        path.unlink()


def _cap_authors(columns: QuestionNumbers, kept: NDArray[np.bool_], most: int) -> NDArray[np.bool_]:
    """Return whether each question is among the first ``most`` of its author, in an order that depends on ids
    alone. Questions of unknown authors always are.
    """
    places = np.flatnonzero(kept & (columns.authors != 0))
    draw = (columns.ids[places].astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    draw = (draw ^ draw >> np.uint64(31)) * np.uint64(0xBF58476D1CE4E5B9)  # as in splitmix64
    order = places[np.lexsort((draw ^ draw >> np.uint64(27), columns.authors[places]))]
    _, starts, sizes = np.unique(columns.authors[order], return_index=True, return_counts=True)
    ranks = np.arange(len(order)) - np.repeat(starts, sizes)
    within_cap = np.ones(len(columns.ids), dtype=bool)
    within_cap[order[ranks >= most]] = False
    return within_cap
