"""Find near duplicates: candidates by MinHash with bands, confirmed by the exact Jaccard index.

Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4. Two texts are near duplicates if the sets of
their three-word shingles have a Jaccard index of at least the threshold. 32 bands of 4 of 128 permutations
miss a pair of index s with probability (1 - s^4)^32: 5e-8 at 0.8, 1.5e-4 at 0.7. A shingle is represented by
64 bits of a hash.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

PERMUTATIONS, BANDS, SEED = 128, 32, 1
ROWS = PERMUTATIONS // BANDS
WORDS = 3
GOLDEN_RATIO = np.uint64(
    0x9E3779B97F4A7C15
)  # 2^64 over the golden ratio: spreads sums over all bits (Knuth, TAOCP 6.4)
SHIFT = np.uint64(29)

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]


class Sketches(NamedTuple):
    """Shingles and bands of n texts."""

    shingles: Hashes  # of all texts one after the other; each text's are distinct and sorted
    ends: Indices  # [n] where each text's shingles end
    bands: Hashes  # [32, n]


def build_sketches(texts: Sequence[str]) -> Sketches:
    """Return shingles and bands of normalised texts."""
    words = RMinHash.hash_token_sets([text.split() or [""] for text in texts])
    shingles = [np.unique(_hash_shingles(np.array(of_text, dtype=np.uint64))) for of_text in words]
    ends = np.cumsum([len(of_text) for of_text in shingles], dtype=np.int64)
    flat = np.concatenate(shingles) if shingles else np.empty(0, dtype=np.uint64)
    starts = np.concatenate([[0], ends]).astype(np.uint64)
    digests = (
        RMinHash.digest_matrix_from_flat_token_hashes(flat, starts, PERMUTATIONS, SEED).to_rows()
        if len(texts)
        else []
    )
    rows = np.array(digests, dtype=np.uint64).reshape(len(texts), BANDS, ROWS)
    return Sketches(flat, ends, np.ascontiguousarray(_mix([rows[:, :, row] for row in range(ROWS)]).T))


def _hash_shingles(words: Hashes) -> Hashes:
    """Return a hash for every three consecutive words; for a shorter text one hash of all words."""
    if len(words) < WORDS:
        return _mix([words[place : place + 1] for place in range(len(words))])
    return _mix([words[place : len(words) - WORDS + 1 + place] for place in range(WORDS)])


def _mix(parts: Sequence[Hashes]) -> Hashes:
    """Return a hash of several numbers, which depends on their order."""
    mixed = np.full(parts[0].shape, len(parts), dtype=np.uint64)
    for part in parts:
        mixed = (mixed ^ part) * GOLDEN_RATIO
        mixed ^= mixed >> SHIFT
    return mixed


def group_near_duplicates(
    leaders: Indices, bands: Iterable[Hashes], shingles_of: Callable[[int], Hashes], threshold: float
) -> None:
    """Group near duplicates, in place.

    ``leaders`` [n] has for each text the index of the first text of its group; the caller has grouped equal
    texts.
    """
    distinct = leaders == np.arange(len(leaders))
    for band in bands:
        for bucket in _iter_buckets(band):
            groups: dict[int, list[int]] = defaultdict(list)
            for number in bucket:
                if distinct[number]:
                    groups[find_leader(leaders, number)].append(number)
            if len(groups) > 1:
                known = {
                    number: frozenset(shingles_of(number).tolist())
                    for group in groups.values()
                    for number in group
                }
                _join_groups(leaders, list(groups.values()), known, threshold)
    for number in range(len(leaders)):
        leaders[number] = find_leader(leaders, number)


def _join_groups(
    leaders: Indices, groups: Sequence[list[int]], known: Mapping[int, frozenset[int]], threshold: float
) -> None:
    """Join groups that have near duplicates of each other; texts of one group are not compared again."""
    distinct: list[list[int]] = []
    for group in groups:
        still_distinct = []
        for other in distinct:
            if any(jaccard(known[one], known[two]) >= threshold for one in group for two in other):
                first, second = sorted((find_leader(leaders, group[0]), find_leader(leaders, other[0])))
                leaders[second] = first
                group = group + other
            else:
                still_distinct.append(other)
        distinct = [*still_distinct, group]


def find_leader(leaders: Indices, number: int) -> int:
    """Return the first text of a text's group (union-find with path halving)."""
    while leaders[number] != number:
        leaders[number] = leaders[leaders[number]]
        number = int(leaders[number])
    return number


def _iter_buckets(band: Hashes) -> Iterator[list[int]]:
    """Yield the indices of texts with the same value, if there are several."""
    order = np.argsort(band, kind="stable")
    _, starts, sizes = np.unique(band[order], return_index=True, return_counts=True)
    for place in np.flatnonzero(sizes > 1).tolist():
        yield order[starts[place] : starts[place] + sizes[place]].tolist()


def jaccard(first: frozenset[int], second: frozenset[int]) -> float:
    """Return the Jaccard index of two sets."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
