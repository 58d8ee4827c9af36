"""Which split a question belongs to: decided by its id alone, so that more data or another order never moves one."""

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

WORD = re.compile(r"\w+")


def split_of(question_id: int, shares: Mapping[str, float]) -> str:
    """Name of the split, each with its share of all ids; ``shares`` sums to 1."""
    digest = hashlib.blake2b(str(question_id).encode(), digest_size=8).digest()
    place = bisect_right(list(accumulate(shares.values())), int.from_bytes(digest, "big") / 2**64)
    return list(shares)[min(place, len(shares) - 1)]  # the sum of shares may fall short of 1 by a rounding


def assign_splits(prompts: Sequence[tuple[int, str]], shares: Mapping[str, float], given: Mapping[int, str] | None = None) -> list[str]:
    """Split of each (question id, prompt). Questions of equal normalised text stay together and follow the smallest id among them.

    ``given`` are the splits that a source has made itself: whoever is in one, or has the text of one that is, is in that one; the others share what
    is left, in proportion.
    """
    given = given or {}
    texts = [normalised(prompt) for _, prompt in prompts]
    leaders: dict[str, int] = {}
    bound: dict[str, str] = {}
    for (question_id, _), text in zip(prompts, texts, strict=True):
        leaders[text] = min(question_id, leaders.get(text, question_id))
        if question_id in given:
            bound[text] = given[question_id]
    left = {name: share for name, share in shares.items() if name not in set(given.values())}
    rest = {name: share / sum(left.values()) for name, share in left.items()} if given else shares
    return [bound[text] if text in bound else split_of(leaders[text], rest) for text in texts]


def normalised(text: str) -> str:
    """Words of a text in lower case: what is left when spacing, case and punctuation are taken away. A text without words is left as it is."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text
