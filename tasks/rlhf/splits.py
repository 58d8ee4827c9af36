"""Which split a question belongs to: decided by its id alone, so that more data or another order never moves one."""

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from tasks.rlhf.near import groups

WORD = re.compile(r"\w+")
BETWEEN = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) == "_")}


def split_of(question_id: int, shares: Mapping[str, float]) -> str:
    """Name of the split, each with its share of all ids; ``shares`` sums to 1."""
    digest = hashlib.blake2b(str(question_id).encode(), digest_size=8).digest()
    place = bisect_right(list(accumulate(shares.values())), int.from_bytes(digest, "big") / 2**64)
    return list(shares)[min(place, len(shares) - 1)]  # the sum of shares may fall short of 1 by a rounding


def assign_splits(
    prompts: Sequence[tuple[int, str]], shares: Mapping[str, float], given: Mapping[int, str] | None = None, *, alike: float = 1.0
) -> list[str]:
    """Split of each (question id, prompt). Questions that say the same stay together and follow the smallest id among them.

    The same are equal normalised texts and, below 1, those of which the share ``alike`` is the same (near.py). ``given`` are the splits that a source
    has made itself: whoever is in one, or says the same as one that is, is in that one; the others share what is left, in proportion.
    """
    order = sorted(range(len(prompts)), key=lambda place: prompts[place][0])
    ids = [prompts[place][0] for place in order]
    leaders = together([prompts[place][1] for place in order], alike)
    chosen = splits_of(ids, leaders, shares, {place: given[id] for place, id in enumerate(ids) if id in given} if given else {})
    found = dict(zip(order, chosen, strict=True))
    return [found[place] for place in range(len(prompts))]


def splits_of(ids: Sequence[int], leaders: Sequence[int], shares: Mapping[str, float], given: Mapping[int, str]) -> Iterator[str]:
    """Split of each question; ``leaders`` has the place of the first that says the same, of the smallest id; ``given`` is by place."""
    bound: dict[int, str] = {}
    for place, name in given.items():
        leader = int(leaders[place])
        bound[leader] = max(name, bound.get(leader, ""))
    left = {name: share for name, share in shares.items() if name not in set(given.values())}
    rest = {name: share / sum(left.values()) for name, share in left.items()} if given else shares
    for leader in leaders:
        yield bound.get(int(leader)) or split_of(int(ids[leader]), rest)


def together(prompts: Sequence[str], alike: float) -> list[int]:
    """For each prompt a number that those have in common which say the same."""
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(normalised(prompt), len(numbers)) for prompt in prompts]
    first = groups(list(numbers), alike) if alike < 1 else range(len(numbers))
    return [first[place] for place in places]


def normalised(text: str) -> str:
    """Words of a text in lower case: what is left when spacing, case and punctuation are taken away. A text without words is left as it is."""
    if text.isascii():  # the same, only five times faster
        return " ".join(text.lower().translate(BETWEEN).split()) or text
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text
