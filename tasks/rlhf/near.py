"""Texts that say nearly the same: candidates by MinHash and bands (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4), confirmed exactly.

Two texts are alike when the sets of their three-word shingles have a Jaccard index of at least the threshold. 32 bands of 4 of 128 permutations miss
a pair of index s with probability (1 - s^4)^32: 5e-8 at 0.8, 1.5e-4 at 0.7.
"""

from collections import defaultdict
from collections.abc import Sequence

from rensa import RMinHash

PERMUTATIONS, BANDS, SEED = 128, 32, 1
ROWS = PERMUTATIONS // BANDS
WORDS = 3


def groups(texts: Sequence[str], threshold: float) -> list[int]:
    """For each normalised text the number of the first text of its group: those that a chain of alike texts links.

    The groups do not depend on the order of the texts; which of a group is the first does.
    """
    shingled = [shingles(text) for text in texts]
    leader = list(range(len(texts)))

    def find(number: int) -> int:
        while leader[number] != number:
            leader[number] = leader[leader[number]]
            number = leader[number]
        return number

    for bucket in _buckets(shingled):
        for place, one in enumerate(bucket):
            for other in bucket[:place]:
                first, second = sorted((find(one), find(other)))
                if first != second and jaccard(shingled[one], shingled[other]) >= threshold:
                    leader[second] = first
    return [find(number) for number in range(len(texts))]


def shingles(text: str) -> frozenset[str]:
    """Runs of three words; of a shorter text itself."""
    words = text.split()
    return frozenset(" ".join(words[k : k + WORDS]) for k in range(max(1, len(words) - WORDS + 1)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Share of the shingles of both that each of them has."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def _buckets(shingled: Sequence[frozenset[str]]) -> list[list[int]]:
    """Numbers of texts that agree in a band."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, parts in enumerate(shingled):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update(sorted(parts))
        digest = sketch.digest()
        for band in range(BANDS):
            found[(band, *digest[band * ROWS : (band + 1) * ROWS])].append(number)
    return [members for members in found.values() if len(members) > 1]
