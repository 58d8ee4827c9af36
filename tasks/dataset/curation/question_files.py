"""Write kept questions to files, one per partition, and beside them the numbers that are compared."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.dataset import columns
from tasks.dataset.columns import Questions
from tasks.dataset.curation.near_duplicates import BANDS, Hashes, Indices, build_sketches
from tasks.dataset.ranking import count_pairs
from tasks.dataset.splits import normalise_words
from tasks.system.files import replacing

SPLITS = ("", "finetune", "reward", "rl", "evaluation")  # "": the source assigns none
EMPTY = np.empty(0, dtype=np.int64)


class QuestionNumbers(NamedTuple):
    """Numbers of n questions in the order of their ids."""

    ids: Indices  # [n]
    prompts: Hashes  # [n], hash of the prompt's words
    authors: Hashes  # [n], hash of the author, 0: unknown
    comparable: NDArray[np.bool_]  # [n], whether two of the answers can be compared
    source_splits: NDArray[np.int8]  # [n], index into SPLITS of the split that the source assigns


def write(questions: Questions, path: Path, *, near_duplicates: bool) -> None:
    """Write questions and their numbers, with ``near_duplicates`` also the sketches of their prompts."""
    columns.write(questions, path)
    words = [normalise_words(prompt) for prompt in questions.about.column("prompt").to_pylist()]
    authors = questions.about.column("author").to_pylist()
    splits = questions.about.column("split").to_pylist()
    numbers = QuestionNumbers(
        ids=questions.about.column("id").to_numpy(),
        prompts=np.array([_hash(text) for text in words], dtype=np.uint64),
        authors=np.array([_hash(author) if author else 0 for author in authors], dtype=np.uint64),
        comparable=count_pairs(questions) > 0,
        source_splits=np.array([SPLITS.index(split) for split in splits], dtype=np.int8),
    )
    with replacing(path.with_suffix(".npz")) as new, new.open("wb") as file:
        np.savez(file, **numbers._asdict())
    if near_duplicates:
        for name, sketch in build_sketches(words)._asdict().items():
            with replacing(path.with_suffix(f".{name}")) as new:
                sketch.tofile(new)


def read_numbers(paths: Sequence[Path]) -> QuestionNumbers:
    """Return the numbers of the questions of all files."""
    parts: list[list[Any]] = [[] for _ in QuestionNumbers._fields]
    for path in paths:
        with np.load(path.with_suffix(".npz")) as arrays:
            for part, name in zip(parts, QuestionNumbers._fields, strict=True):
                part.append(arrays[name])
    joined: list[Any] = [np.concatenate(part) if part else EMPTY for part in parts]
    return QuestionNumbers(*joined)


def read_band(paths: Sequence[Path], number: int) -> Hashes:
    """Return one band of the questions of all files, [n]."""
    parts = []
    for path in paths:
        count = path.with_suffix(".ends").stat().st_size // 8
        parts.append(
            np.fromfile(path.with_suffix(".bands"), dtype=np.uint64, count=count, offset=8 * count * number)
        )
        assert path.with_suffix(".bands").stat().st_size == 8 * BANDS * count
    return np.concatenate(parts)


def join_shingles(paths: Sequence[Path]) -> tuple[Path, Indices]:
    """Copy the shingles of all files into one.

    Return it, and where each question's shingles end there, [n].
    """
    joined, ends, before = paths[0].with_name("shingles"), [], 0
    with joined.open("wb") as file:
        for path in paths:
            ends_of_part = np.fromfile(path.with_suffix(".ends"), dtype=np.int64)
            ends.append(ends_of_part + before)
            before += int(ends_of_part[-1]) if len(ends_of_part) else 0
            with path.with_suffix(".shingles").open("rb") as part:
                shutil.copyfileobj(part, file, 2**20)
    return joined, np.concatenate(ends)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
