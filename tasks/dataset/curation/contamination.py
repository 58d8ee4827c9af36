"""Texts that share a run of words with an evaluation set, so that nothing is trained on what is tested later (Brown et al. 2020, appendix C).

Words are compared without case, punctuation and spacing. Where a language is written without spaces, a clause is a word: there only long copies
are found. Two runs are taken for one another by chance with a probability of about 2^-64 (multilinear hashing; Lemire and Kaser 2014).
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
MIN_WORDS = 8  # of a text: shorter ones stand in many innocent texts
VOCABULARY = 2**17  # words whose hashes are remembered
LINES = ".txt"

Ngrams = Mapping[int, frozenset[int]]  # hashes of runs, by their length in words
Hashes = NDArray[np.uint64]


def collect_ngrams(texts: Iterable[str], n: int = NGRAM) -> Ngrams:
    """The runs of ``n`` words of each text. A shorter text of at least 8 words is one run of its own length; one that is shorter still is ignored."""
    found: dict[int, set[int]] = defaultdict(set)
    for text in texts:
        words = _hash_words(text)
        if len(words) >= min(n, MIN_WORDS):
            length = min(n, len(words))
            found[length].update(_hash_ngrams(words, length))
    return {length: frozenset(found[length]) for length in sorted(found)}


def overlaps(text: str, found: Ngrams) -> bool:
    """Whether the text holds one of the runs."""
    words = _hash_words(text)
    return any(
        not runs.isdisjoint(_hash_ngrams(words, length))
        for length, runs in found.items()
        if length <= len(words)
    )


def write(found: Ngrams, path: Path) -> None:
    """The runs in a file, for whichever process needs them."""
    arrays: dict[str, Any] = {
        str(length): np.array(sorted(runs), np.uint64) for length, runs in found.items()
    }
    with replacing(path) as new, new.open("wb") as file:
        np.savez(file, **arrays)


@lru_cache(1)
def read(path: Path) -> Ngrams:
    """What ``write`` wrote; remembered, for it is asked for range after range."""
    with np.load(path) as found:
        return {int(length): frozenset(found[length].tolist()) for length in found.files}


def read_texts(path: Path) -> Iterator[str]:
    """Every string of at least 8 words in the rows of JSON lines, JSON lists or parquet files, however deep; of a .txt every such line.

    Of a folder all such files. Raises InputError where nothing is found or anything cannot be read: what is not read is not looked for.
    """
    count = 0
    for text in _iter_strings(path):
        if len(normalise_words(text).split()) >= MIN_WORDS:
            count += 1
            yield text
    if not count:
        raise InputError(
            f"{path} holds no text of {MIN_WORDS} words or more, so nothing could ever share one with it: give another evaluation set."
        )


def _iter_strings(path: Path) -> Iterator[str]:
    plain = (
        sorted(path.rglob(f"*{LINES}"))
        if path.is_dir()
        else [path]
        if path.is_file() and path.suffix == LINES
        else []
    )
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
            f"{where} cannot be read ({', '.join(bad.reasons)}; the first: {bad.first}): give lines or a list of JSON objects, or parquet."
        )


def _iter_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a text in UTF-8 ({error.reason}): save it as UTF-8.") from error


def _iter_row_strings(value: Any) -> Iterator[str]:
    """The strings of a row. What is nested deeply would be too deep for recursion."""
    held = [value]
    while held:
        value = held.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            held.extend(value.values())
        elif isinstance(value, list | tuple):
            held.extend(value)


def _hash_words(text: str) -> Hashes:
    """Hash of each word."""
    words = normalise_words(text).split()
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def _hash_ngrams(words: Hashes, length: int) -> list[int]:
    """Hash of each run of so many words: their sum, each times the factor of its place, modulo 2^64."""
    found: list[int] = np.convolve(words, _place_factors(length), "valid").tolist()
    return found


@cache
def _place_factors(length: int) -> Hashes:
    return np.array([_hash(f" {place}") | 1 for place in range(length)], np.uint64)


@lru_cache(VOCABULARY)
def _hash(word: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big"
    )
