"""Kept questions on disk, a range of ids to a shelf: the texts as lines of JSON, and beside them the numbers that are compared across all shelves."""

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson

from tasks.dataset.curation.near_duplicates import BANDS, build_sketches
from tasks.dataset.question import Answer, Question
from tasks.dataset.splits import normalise_words
from tasks.system.files import replacing

SPLITS = ("", "finetune", "reward", "rl", "evaluation")  # "": none that its source has put it in


class QuestionColumns(NamedTuple):
    """Of n questions in the order of their ids."""

    ids: Any  # int64 [n]
    texts: Any  # uint64 [n], of the prompt's words
    authors: Any  # uint64 [n], 0: unknown
    comparable: Any  # bool [n], whether two of its answers can be compared
    given: Any  # int8 [n], a place in SPLITS


def write(questions: Sequence[Question], path: Path, *, near: bool) -> None:
    """``near``: also what finds prompts that say nearly the same."""
    with replacing(path) as new:
        new.write_bytes(
            b"".join(
                orjson.dumps(question_to_json(question), option=orjson.OPT_APPEND_NEWLINE)
                for question in questions
            )
        )
    words = [normalise_words(question.prompt) for question in questions]
    columns = QuestionColumns(
        np.array([question.id for question in questions], dtype=np.int64),
        np.array([_hash(text) for text in words], dtype=np.uint64),
        np.array(
            [_hash(question.author) if question.author else 0 for question in questions], dtype=np.uint64
        ),
        np.array([_is_comparable(question) for question in questions], dtype=bool),
        np.array([SPLITS.index(question.split) for question in questions], dtype=np.int8),
    )
    with replacing(path.with_suffix(".npz")) as new, new.open("wb") as file:
        np.savez(file, **columns._asdict())
    if near:
        for name, numbers in build_sketches(words)._asdict().items():
            with replacing(path.with_suffix(f".{name}")) as new:
                numbers.tofile(new)


def read(path: Path) -> Iterator[Question]:
    """In the order of their ids."""
    with path.open("rb") as file:
        for line in file:
            yield question_from_json(orjson.loads(line))


def read_columns(paths: Sequence[Path]) -> QuestionColumns:
    """Those of all shelves."""
    columns: list[list[Any]] = [[] for _ in QuestionColumns._fields]
    for path in paths:
        with np.load(path.with_suffix(".npz")) as found:
            for column, name in zip(columns, QuestionColumns._fields, strict=True):
                column.append(found[name])
    return QuestionColumns(
        *(np.concatenate(column) if column else np.empty(0, dtype=np.int64) for column in columns)
    )


def read_band(paths: Sequence[Path], number: int) -> Any:
    """One band of all shelves' sketches, uint64 [n]."""
    found = []
    for path in paths:
        count = path.with_suffix(".ends").stat().st_size // 8
        found.append(
            np.fromfile(path.with_suffix(".bands"), dtype=np.uint64, count=count, offset=8 * count * number)
        )
        assert path.with_suffix(".bands").stat().st_size == 8 * BANDS * count
    return np.concatenate(found)


def join_shingles(paths: Sequence[Path]) -> tuple[Path, Any]:
    """All shelves' shingles in one file, and where each question's end there, int64 [n]."""
    whole, ends, before = paths[0].with_name("shingles"), [], 0
    with whole.open("wb") as file:
        for path in paths:
            of_one = np.fromfile(path.with_suffix(".ends"), dtype=np.int64)
            ends.append(of_one + before)
            before += int(of_one[-1]) if len(of_one) else 0
            with path.with_suffix(".shingles").open("rb") as part:
                shutil.copyfileobj(part, file, 2**20)
    return whole, np.concatenate(ends)


def question_from_json(fields: list[Any]) -> Question:
    """The question that ``plain`` gave."""
    *about, answers, compared, split, name = fields
    pairs = None if compared is None else tuple((better, worse) for better, worse in compared)
    return Question._make([*about, tuple(Answer._make(answer) for answer in answers), pairs, split, name])


def question_to_json(question: Question) -> list[Any]:
    """The question as JSON can hold it."""
    return [
        *question[:7],
        [list(answer) for answer in question.answers],
        question.compared,
        question.split,
        question.author_name,
    ]


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _is_comparable(question: Question) -> bool:
    return (
        bool(question.compared)
        if question.compared is not None
        else len({answer.score for answer in question.answers}) > 1
    )
