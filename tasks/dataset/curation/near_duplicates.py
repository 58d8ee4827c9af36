"""Texts that say nearly the same: candidates by MinHash and bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4), confirmed exactly.

Two texts are alike when the sets of their three-word shingles have a Jaccard index of at least the threshold. 32 bands of 4 of 128 permutations miss
a pair of index s with probability (1 - s^4)^32: 5e-8 at 0.8, 1.5e-4 at 0.7. A shingle is known by 64 bits of a hash.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rensa import RMinHash

PERMUTATIONS, BANDS, SEED = 128, 32, 1
ROWS = PERMUTATIONS // BANDS
WORDS = 3
GOLDEN_RATIO = np.uint64(
    0x9E3779B97F4A7C15
)  # 2^64 over the golden ratio: spreads sums over all bits (Knuth, TAOCP 6.4)
SHIFT = np.uint64(29)

Hashes = Any  # an array of 64-bit numbers


class Sketches(NamedTuple):
    """What is compared of n texts."""

    shingles: Hashes  # of all texts one after the other; each text's are distinct and sorted
    ends: Any  # [n] where each text's shingles end
    bands: Hashes  # [32, n]


def build_sketches(texts: Sequence[str]) -> Sketches:
    """Shingles and bands of normalised texts."""
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
    """Of every three words in a row one number; of a shorter text one of all."""
    if len(words) < WORDS:
        return _mix([words[place : place + 1] for place in range(len(words))])
    return _mix([words[place : len(words) - WORDS + 1 + place] for place in range(WORDS)])


def _mix(parts: Sequence[Hashes]) -> Hashes:
    """One number of several, in which their order counts."""
    found = np.full(parts[0].shape, len(parts), dtype=np.uint64)
    for part in parts:
        found = (found ^ part) * GOLDEN_RATIO
        found ^= found >> SHIFT
    return found


def group_near_duplicates(
    leaders: Any, bands: Sequence[Hashes], shingles_of: Callable[[int], Hashes], threshold: float
) -> None:
    """Join alike texts to groups, in place: ``leaders`` [n] has for each text the first of its group, at first of those that are equal."""
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
    leaders: Any, groups: Sequence[list[int]], known: Mapping[int, frozenset[int]], threshold: float
) -> None:
    """Join groups of which any two texts are alike; within a group nothing is left to compare."""
    apart: list[list[int]] = []
    for group in groups:
        still_apart = []
        for other in apart:
            if any(jaccard(known[one], known[two]) >= threshold for one in group for two in other):
                first, second = sorted((find_leader(leaders, group[0]), find_leader(leaders, other[0])))
                leaders[second] = first
                group = group + other
            else:
                still_apart.append(other)
        apart = [*still_apart, group]


def find_leader(leaders: Any, number: int) -> int:
    """The first of a text's group; the way to it is shortened."""
    while leaders[number] != number:
        leaders[number] = leaders[leaders[number]]
        number = int(leaders[number])
    return number


def _iter_buckets(band: Hashes) -> Iterator[list[int]]:
    """Numbers of texts with the same value, where there are several."""
    order = np.argsort(band, kind="stable")
    values = band[order]
    starts = (
        np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        if len(values)
        else np.empty(0, dtype=np.int64)
    )
    sizes = np.diff(np.append(starts, len(values)))
    for place in np.flatnonzero(sizes > 1).tolist():
        yield order[starts[place] : starts[place] + sizes[place]].tolist()


def jaccard(first: frozenset[Any], second: frozenset[Any]) -> float:
    """Share of the shingles of both that each of them has."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
