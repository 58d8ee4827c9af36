"""Write kept questions to files, one per partition, and read them back.

The texts are lines of JSON; beside them are the numbers that are compared across all partitions.
"""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from tasks.dataset.curation.near_duplicates import BANDS, Hashes, Indices, build_sketches
from tasks.dataset.question import Answer, Question
from tasks.dataset.splits import normalise_words
from tasks.system.files import replacing

SPLITS = ("", "finetune", "reward", "rl", "evaluation")  # "": the source assigns none
EMPTY = np.empty(0, dtype=np.int64)


class QuestionColumns(NamedTuple):
    """Numbers of n questions in the order of their ids."""

    ids: Indices  # [n]
    prompts: Hashes  # [n], hash of the prompt's words
    authors: Hashes  # [n], hash of the author, 0: unknown
    comparable: NDArray[np.bool_]  # [n], whether two of the answers can be compared
    source_splits: NDArray[np.int8]  # [n], index into SPLITS of the split that the source assigns


def write(questions: Sequence[Question], path: Path, *, near_duplicates: bool) -> None:
    """Write questions and their numbers, with ``near_duplicates`` also the sketches of their prompts."""
    lines = (orjson.dumps(question_to_json(q), option=orjson.OPT_APPEND_NEWLINE) for q in questions)
    with replacing(path) as new:
        new.write_bytes(b"".join(lines))
    words = [normalise_words(question.prompt) for question in questions]
    authors = [_hash(question.author) if question.author else 0 for question in questions]
    columns = QuestionColumns(
        ids=np.array([question.id for question in questions], dtype=np.int64),
        prompts=np.array([_hash(text) for text in words], dtype=np.uint64),
        authors=np.array(authors, dtype=np.uint64),
        comparable=np.array([_is_comparable(question) for question in questions], dtype=bool),
        source_splits=np.array([SPLITS.index(question.split) for question in questions], dtype=np.int8),
    )
    with replacing(path.with_suffix(".npz")) as new, new.open("wb") as file:
        np.savez(file, **columns._asdict())
    if near_duplicates:
        for name, numbers in build_sketches(words)._asdict().items():
            with replacing(path.with_suffix(f".{name}")) as new:
                numbers.tofile(new)


def read(path: Path) -> Iterator[Question]:
    """Yield the questions of a file in the order of their ids."""
    with path.open("rb") as file:
        for line in file:
            yield question_from_json(orjson.loads(line))


def read_columns(paths: Sequence[Path]) -> QuestionColumns:
    """Return the numbers of the questions of all files."""
    columns: list[list[Any]] = [[] for _ in QuestionColumns._fields]
    for path in paths:
        with np.load(path.with_suffix(".npz")) as arrays:
            for column, name in zip(columns, QuestionColumns._fields, strict=True):
                column.append(arrays[name])
    joined: list[Any] = [np.concatenate(column) if column else EMPTY for column in columns]
    return QuestionColumns(*joined)


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


def question_from_json(fields: list[Any]) -> Question:
    """Return the question of fields that ``question_to_json`` returned."""
    *about, answers, compared, split, name, messages = fields
    pairs = None if compared is None else tuple((better, worse) for better, worse in compared)
    replies = tuple(Answer._make(answer) for answer in answers)
    turns = tuple((role, text) for role, text in messages)
    return Question._make([*about, replies, pairs, split, name, turns])


def question_to_json(question: Question) -> list[Any]:
    """Return the question as values that JSON can hold."""
    return [
        *question[:7],
        [list(answer) for answer in question.answers],
        question.compared,
        question.split,
        question.author_name,
        question.messages,
    ]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _is_comparable(question: Question) -> bool:
    if question.compared is not None:
        return bool(question.compared)
    return len({answer.score for answer in question.answers}) > 1
