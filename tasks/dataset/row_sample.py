"""Which rows of a table are taken when it is not taken whole. Tables stand in the order of question ids, so that the first rows are the oldest."""

import hashlib
from collections.abc import Sequence


def draw_sample(ids: Sequence[int], most: int) -> list[int]:
    """Return the places of at most ``most`` ids, those with the smallest hashes, by rising hash.

    A part of a drawn list from its start is a draw itself. It is decided by the ids alone: neither other rows nor a seed change whether a
    question is taken before another, so runs with several seeds are measured on the same questions.
    """
    return sorted(range(len(ids)), key=lambda place: (_hash(ids[place]), place))[:most]


def _hash(id: int) -> bytes:
    return hashlib.blake2b(str(id).encode(), digest_size=8, person=b"draw").digest()
