"""Draw a sample of a table's rows.

Tables are in the order of question ids, so their first rows are the oldest questions and no random sample.
"""

import hashlib
from collections.abc import Sequence


def draw_sample(ids: Sequence[int], most: int) -> list[int]:
    """Return the indices of at most ``most`` ids, those with the smallest hashes, by rising hash.

    The beginning of a sample is a smaller sample. The order depends on the ids alone, not on other rows or a
    seed, so runs with several seeds are measured on the same questions.
    """
    return sorted(range(len(ids)), key=lambda index: (_hash(ids[index]), index))[:most]


def _hash(id: int) -> bytes:
    return hashlib.blake2b(str(id).encode(), digest_size=8, person=b"draw").digest()
