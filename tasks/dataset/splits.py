"""Assign questions to splits by their ids, so that more data or another order moves no question.

Except: near duplicates share the split of the one with the lowest id, and a source with a test set of its own
leaves the other splits that set's share.
"""

import hashlib
import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
WORD = re.compile(r"\w+")
LETTERS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
TEST_WORDS = frozenset(
    "test tests testing testset eval evals evaluate evaluation evalset valid validation val dev devset "
    "heldout holdout".split()
)
TRAIN_WORDS = frozenset(("train", "training", "trainset"))
SEPARATORS = {code: " " for code in range(128) if not (chr(code).isalnum() or chr(code) == "_")}


def choose_split(question_id: int, shares: Mapping[str, float]) -> str:
    """Return the name of an id's split. ``shares`` are the parts of all ids by split and sum to 1."""
    digest = hashlib.blake2b(str(question_id).encode(), digest_size=8).digest()
    index = bisect_right(list(accumulate(shares.values())), int.from_bytes(digest, "big") / 2**64)
    return list(shares)[min(index, len(shares) - 1)]  # the sum of shares may fall short of 1 by a rounding


def choose_splits(
    ids: Sequence[int] | Indices,
    leaders: Sequence[int] | Indices,
    shares: Mapping[str, float],
    given: Mapping[int, str],
) -> Iterator[str]:
    """Yield the split of each question, by rising ids.

    Near duplicates stay together: ``leaders`` has for each question the index of the first of its group,
    whose split all of them get. ``given`` has the splits that the source itself assigns, by index; a group
    with such a question goes there. The other questions share the remaining splits, in proportion.
    """
    bound: dict[int, str] = {}
    for index, name in given.items():
        leader = int(leaders[index])
        bound[leader] = max(name, bound.get(leader, ""))
    left = {name: share for name, share in shares.items() if name not in set(given.values())}
    rest = {name: share / sum(left.values()) for name, share in left.items()} if given else shares
    for leader in leaders:
        yield bound.get(int(leader)) or choose_split(int(ids[leader]), rest)


@lru_cache(maxsize=256)  # rows follow each other in a file
def is_test(path: str) -> bool:
    """Return whether the name of a file, or of a folder above it, says that it is a test set.

    test_prefs-00000.parquet, dev/rows.jsonl, held-out.json. Words end where letters do or at a capital, as
    the Hugging Face hub reads names, so "latest" and "contest" are no test sets. A name with words of both
    kinds (train_test_split) says nothing.
    """
    return any(_is_test_name(name) for name in path.split("/"))


def _is_test_name(name: str) -> bool:
    words = [word.lower() for word in LETTERS.findall(name)]
    joined = {first + second for first, second in pairwise(words)}
    return bool(TEST_WORDS & {*words, *joined}) and not TRAIN_WORDS & set(words)


def normalise_words(text: str) -> str:
    """Return the words of a text in lower case, without punctuation; a text without words unchanged."""
    if text.isascii():  # same result, five times faster
        return " ".join(text.lower().translate(SEPARATORS).split()) or text
    return " ".join(WORD.findall(unicodedata.normalize("NFKC", text).casefold())) or text
