"""Which split a question belongs to: decided by its id alone, so that more data or another order never moves one."""

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

WORD = re.compile(r"\w+")
LETTERS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
TEST_WORDS = frozenset(
    "test tests testing testset eval evals evaluate evaluation evalset valid validation val dev devset heldout holdout".split()
)
TRAIN_WORDS = frozenset(("train", "training", "trainset"))
BETWEEN = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) == "_")}


def choose_split(question_id: int, shares: Mapping[str, float]) -> str:
    """Name of the split, each with its share of all ids; ``shares`` sums to 1."""
    digest = hashlib.blake2b(str(question_id).encode(), digest_size=8).digest()
    place = bisect_right(list(accumulate(shares.values())), int.from_bytes(digest, "big") / 2**64)
    return list(shares)[min(place, len(shares) - 1)]  # the sum of shares may fall short of 1 by a rounding


def choose_splits(
    ids: Sequence[int], leaders: Sequence[int], shares: Mapping[str, float], given: Mapping[int, str]
) -> Iterator[str]:
    """Split of each question, by rising ids. Questions that say the same stay together and follow the first of them, whose place is in ``leaders``.

    ``given``, by place, are the splits that a source has made itself: whoever is in one, or says the same as one that is, is in that one; the others
    share what is left, in proportion.
    """
    bound: dict[int, str] = {}
    for place, name in given.items():
        leader = int(leaders[place])
        bound[leader] = max(name, bound.get(leader, ""))
    left = {name: share for name, share in shares.items() if name not in set(given.values())}
    rest = {name: share / sum(left.values()) for name, share in left.items()} if given else shares
    for leader in leaders:
        yield bound.get(int(leader)) or choose_split(int(ids[leader]), rest)


@lru_cache(maxsize=256)  # rows follow each other in a file
def is_test(path: str) -> bool:
    """Return whether a file, or a folder that it lies in, is named as a test set: test_prefs-00000.parquet, dev/rows.jsonl, held-out.json.

    Words end where letters do or at a capital, as the Hugging Face hub reads names, so "latest" and "contest" are none. A name with both words
    (train_test_split) says nothing.
    """
    return any(_is_test_name(name) for name in path.split("/"))


def _is_test_name(name: str) -> bool:
    words = [word.lower() for word in LETTERS.findall(name)]
    joined = {first + second for first, second in pairwise(words)}
    return bool(TEST_WORDS & {*words, *joined}) and not TRAIN_WORDS & set(words)


def normalise_words(text: str) -> str:
    """Words of a text in lower case: what is left when spacing, case and punctuation are taken away. A text without words is left as it is."""
    if text.isascii():  # the same, only five times faster
        return " ".join(text.lower().translate(BETWEEN).split()) or text
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text
