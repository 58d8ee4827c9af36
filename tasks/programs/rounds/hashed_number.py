"""Draw numbers by hashes, so that a draw depends on no other row and on no order of rows."""

import hashlib

BITS = 53  # of a float's precision


def hashed_number(purpose: str, seed: int, name: str | int) -> float:
    """Return a number from [0, 1) that depends on these three alone.

    Numbers for two purposes (of at most 16 letters) are independent.
    """
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8, person=purpose.encode()).digest()
    return (int.from_bytes(digest) >> (64 - BITS)) / 2**BITS
