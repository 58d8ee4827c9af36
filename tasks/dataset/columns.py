"""Hold many questions with their answers in columns, and write them to Arrow files.

Texts are large strings: the offsets of Arrow's plain strings end at 2 GB.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.dataset.conversation import from_records
from tasks.dataset.question import Answer, Pair, Question
from tasks.system.files import replacing

Indices = NDArray[np.int64]
Mask = NDArray[np.bool_]

WORD, TEXT = pa.string(), pa.large_string()


def messages_type(text: pa.DataType) -> pa.DataType:
    """Return the type of a conversation's messages whose texts have the type ``text``."""
    return pa.list_(pa.struct([("role", WORD), ("content", text)]))


MESSAGES = messages_type(TEXT)
QUESTION = {
    "id": pa.int64(), "prompt": TEXT, "created": WORD, "site": WORD, "url": WORD, "author": WORD,
    "licence": WORD, "split": WORD, "author_name": WORD, "messages": MESSAGES,
}  # fmt: skip
ANSWER = {
    "id": pa.int64(), "score": pa.float64(), "votes": pa.int64(), "accepted": pa.bool_(), "created": WORD,
    "text": TEXT, "url": WORD, "author": WORD, "licence": WORD, "author_name": WORD,
}  # fmt: skip


class Questions(NamedTuple):
    """n questions in the order of their ids, and their m answers, question by question, by id."""

    about: pa.RecordBatch  # [n], columns of QUESTION
    answers: pa.RecordBatch  # [m], columns of ANSWER; scores may be integers
    starts: Indices  # [n + 1] where each question's answers start; the last is m
    compared: Mask  # [n] whether the source compares the answers itself; else the higher score wins
    pairs: Indices  # [k, 2] those comparisons, sorted: rows of the better and the worse answer

    @property
    def sizes(self) -> Indices:
        """Return the number of answers of each question, [n]."""
        return np.diff(self.starts)

    @property
    def owners(self) -> Indices:
        """Return the row of each answer's question, [m]."""
        return np.repeat(np.arange(len(self.compared)), self.sizes)

    def number(self, column: str) -> NDArray[Any]:
        """Return a column of the answers without texts, [m]."""
        values: NDArray[Any] = self.answers.column(column).to_numpy(zero_copy_only=False)
        return values


def select(questions: Questions, kept: Mask, kept_answers: Mask | None = None) -> Questions:
    """Return the questions of a mask [n], with all their answers or those of a mask [m]."""
    kept_rows = np.repeat(kept, questions.sizes)
    if kept_answers is not None:
        kept_rows &= kept_answers
    new_rows = np.cumsum(kept_rows) - 1
    sizes = np.bincount(questions.owners[kept_rows], minlength=len(kept))[kept]
    return Questions(
        about=questions.about.filter(pa.array(kept)),
        answers=questions.answers.filter(pa.array(kept_rows)),
        starts=to_starts(sizes),
        compared=questions.compared[kept],
        pairs=new_rows[questions.pairs[kept_rows[questions.pairs].all(axis=1)]],
    )


def replace_column(batch: pa.RecordBatch, name: str, values: pa.Array) -> pa.RecordBatch:
    """Return a batch with other values in a column."""
    return batch.set_column(batch.schema.get_field_index(name), name, values)


def to_starts(sizes: Sequence[int] | Indices) -> Indices:
    """Return where each of consecutive parts starts, and the end of the last."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def from_rows(questions: Sequence[Question]) -> Questions:
    """Return questions, which must be in the order of their ids, in columns."""
    sizes = [len(question.answers) for question in questions]
    starts = to_starts(sizes)
    answers = [answer for question in questions for answer in question.answers]
    pairs = [
        (start + better, start + worse)
        for start, question in zip(starts.tolist(), questions, strict=False)
        for better, worse in sorted(question.compared or ())
    ]
    return Questions(
        about=_to_batch(questions, Question._fields, QUESTION),
        answers=_to_batch(answers, Answer._fields, ANSWER),
        starts=starts,
        compared=np.array([question.compared is not None for question in questions], dtype=bool),
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
    )


def to_rows(questions: Questions) -> list[Question]:
    """Return questions in columns as rows."""
    answers = [Answer(**row) for row in questions.answers.to_pylist()]
    pairs: list[list[Pair]] = [[] for _ in questions.compared]
    for better, worse in questions.pairs.tolist():
        row = int(questions.owners[better])
        start = int(questions.starts[row])
        pairs[row].append((better - start, worse - start))
    rows = []
    for row, fields in enumerate(questions.about.to_pylist()):
        start, end = questions.starts[row : row + 2]
        fields["messages"] = from_records(fields["messages"])
        compared = tuple(pairs[row]) if questions.compared[row] else None
        rows.append(Question(**fields, answers=tuple(answers[start:end]), compared=compared))
    return rows


def _to_batch(
    rows: Sequence[tuple[Any, ...]], fields: Sequence[str], types: dict[str, pa.DataType]
) -> pa.RecordBatch:
    columns = dict(zip(fields, zip(*rows, strict=True), strict=True)) if rows else {}
    arrays = [pa.array(columns.get(name, ()), kind) for name, kind in types.items()]
    return pa.RecordBatch.from_arrays(arrays, names=list(types))


def to_batch(questions: Questions) -> pa.RecordBatch:
    """Return a row for each question: answers and comparisons are lists in columns of their questions."""
    owners = questions.owners[questions.pairs[:, 0]]
    places = (questions.pairs - questions.starts[owners][:, None]).astype(np.int32)
    pair_starts = to_starts(np.bincount(owners, minlength=len(questions.compared)))
    lists = {
        "answers": pa.LargeListArray.from_arrays(questions.starts, questions.answers.to_struct_array()),
        "compared": pa.array(questions.compared),
        "pairs": pa.LargeListArray.from_arrays(
            pair_starts, pa.FixedSizeListArray.from_arrays(pa.array(places.ravel()), 2)
        ),
    }
    batch = questions.about
    for name, values in lists.items():
        batch = batch.append_column(name, values)
    return batch


def from_batch(batch: pa.RecordBatch) -> Questions:
    """Return the questions of a batch that ``to_batch`` made."""
    starts = batch.column("answers").offsets.to_numpy()
    pairs, pair_starts = batch.column("pairs").values, batch.column("pairs").offsets.to_numpy()
    owners = np.repeat(np.arange(len(batch)), np.diff(pair_starts))
    places = pairs.values.to_numpy().reshape(-1, 2).astype(np.int64)
    return Questions(
        about=batch.select(list(QUESTION)),
        answers=pa.RecordBatch.from_struct_array(batch.column("answers").values),
        starts=starts,
        compared=batch.column("compared").to_numpy(zero_copy_only=False),
        pairs=places + starts[owners][:, None],
    )


def write(questions: Questions, path: Path) -> None:
    """Write questions to a file."""
    batch = to_batch(questions)
    with replacing(path) as new, pa.OSFile(str(new), "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)


def read(path: Path) -> Questions:
    """Return the questions of a file."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        return from_batch(reader.get_batch(0))
