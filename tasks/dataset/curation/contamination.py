"""Find texts that share an n-gram of words with an evaluation set (Brown et al. 2020, appendix C).

Such texts are not trained on, because they are tested on later. Words are compared without case, punctuation
and spacing. In a language that is written without spaces, a clause counts as a word: there only long copies
are found. Two different n-grams have the same hash with a probability of about 2^-64 (multilinear hashing;
Lemire and Kaser 2014).
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.row_files import ENDINGS, read_rows
from tasks.dataset.splits import normalise_words
from tasks.system.errors import InputError
from tasks.system.files import replacing

NGRAM = 13  # words
MIN_WORDS = 8  # of a text: shorter ones are part of many unrelated texts
VOCABULARY = 2**17  # words whose hashes are cached
LINES = ".txt"

Ngrams = Mapping[int, frozenset[int]]  # hashes of n-grams, by n
Hashes = NDArray[np.uint64]


def collect_ngrams(texts: Iterable[str], n: int = NGRAM) -> Ngrams:
    """Return the hashes of the n-grams of each text.

    A shorter text of at least 8 words is one n-gram of its own length; texts with fewer words are ignored.
    """
    ngrams: dict[int, set[int]] = defaultdict(set)
    for text in texts:
        words = _hash_words(text)
        if len(words) >= min(n, MIN_WORDS):
            length = min(n, len(words))
            ngrams[length].update(_hash_ngrams(words, length))
    return {length: frozenset(ngrams[length]) for length in sorted(ngrams)}


def overlaps(text: str, ngrams: Ngrams) -> bool:
    """Return whether the text contains one of the n-grams."""
    words = _hash_words(text)
    shorter = (length for length in ngrams if length <= len(words))
    return any(not ngrams[length].isdisjoint(_hash_ngrams(words, length)) for length in shorter)


def write(ngrams: Ngrams, path: Path) -> None:
    """Write n-grams to a file that all workers read."""
    arrays: dict[str, Any] = {str(n): np.array(sorted(hashes), np.uint64) for n, hashes in ngrams.items()}
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, **arrays)


@lru_cache(1)
def read(path: Path) -> Ngrams:
    """Return the n-grams of a file; cached, because every partition needs them."""
    with np.load(path) as arrays:
        return {int(length): frozenset(arrays[length].tolist()) for length in arrays.files}


def read_texts(path: Path) -> Iterator[str]:
    """Yield every string of at least 8 words of an evaluation set.

    From JSON lines, JSON lists and parquet files, strings at any depth of a row; from a .txt file, lines;
    from a folder, those of all such files. Raises InputError if there are none or if a row cannot be read,
    because its text would not be searched for.
    """
    count = 0
    for text in _iter_strings(path):
        if len(normalise_words(text).split()) >= MIN_WORDS:
            count += 1
            yield text
    if not count:
        raise InputError(
            f"{path} holds no text of {MIN_WORDS} words or more, so nothing could ever share one with it: "
            "give another evaluation set."
        )


def _iter_strings(path: Path) -> Iterator[str]:
    if path.is_dir():
        plain = sorted(path.rglob(f"*{LINES}"))
    else:
        plain = [path] if path.is_file() and path.suffix == LINES else []
    for file in plain:
        yield from _iter_lines(file)
    if plain and not any(file.name.endswith(ENDINGS) for file in path.rglob("*")):
        return
    bad = Quarantine()
    for row in read_rows(path, bad):
        yield from _iter_row_strings(row.fields)
    if bad.reasons:
        where = f"{bad.reasons.total()} of {bad.rows} rows of {path}"
        raise InputError(
            f"{where} cannot be read ({', '.join(bad.reasons)}; the first: {bad.first}): "
            "give lines or a list of JSON objects, or parquet."
        )


def _iter_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8 ({error.reason}): save it as UTF-8.") from error


def _iter_row_strings(value: Any) -> Iterator[str]:
    """Yield the strings of a row. A stack, not recursion: rows may be nested deeper than Python's limit."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, list | tuple):
            stack.extend(value)


def _hash_words(text: str) -> Hashes:
    """Return the hash of each word."""
    words = normalise_words(text).split()
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def _hash_ngrams(words: Hashes, length: int) -> list[int]:
    """Return the hash of each n-gram: the sum of word hash times place factor, modulo 2^64."""
    hashes: list[int] = np.convolve(words, _place_factors(length), "valid").tolist()
    return hashes


@cache
def _place_factors(length: int) -> Hashes:
    return np.array([_hash(f" {place}") | 1 for place in range(length)], np.uint64)


@lru_cache(VOCABULARY)
def _hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
