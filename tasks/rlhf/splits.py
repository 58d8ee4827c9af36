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


def assign_splits(prompts: Sequence[tuple[int, str]], shares: Mapping[str, float]) -> list[str]:
    """Split of each (question id, prompt). Questions of equal normalised text follow the smallest id among them."""
    texts = [normalised(prompt) for _, prompt in prompts]
    leaders: dict[str, int] = {}
    for (question_id, _), text in zip(prompts, texts, strict=True):
        leaders[text] = min(question_id, leaders.get(text, question_id))
    splits = {leader: split_of(leader, shares) for leader in leaders.values()}
    return [splits[leaders[text]] for text in texts]


def normalised(text: str) -> str:
    """Words of a text in lower case: what is left when spacing, case and punctuation are taken away. A text without words is left as it is."""
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text
