"""Define the data stage's tables, build their columns from questions, and write them as parquet.

The bytes of a file depend on its rows alone.
"""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.columns import Indices, Mask, Questions, messages_type, select
from tasks.dataset.ranking import compare_ages, order_by_preference, rank_ages, rank_scores
from tasks.system.files import replacing

TEXT, INTEGER, NUMBER, TEXTS = pa.string(), pa.int32(), pa.float64(), pa.list_(pa.string())
MESSAGES = messages_type(TEXT)
ROW_GROUP = 8_192  # rows
FEW_VALUES = re.compile("site|.*_licence")  # columns that a dictionary encodes well
SOURCE = ("url", "author", "author_name", "licence")  # of a question or an answer


def _source_types(role: str, kind: pa.DataType = TEXT) -> dict[str, pa.DataType]:
    return {f"{role}_{name}": kind for name in SOURCE}


ABOUT_QUESTION = {"site": TEXT} | _source_types("question")
PROMPT = {"question_id": pa.int64(), "prompt": TEXT, "messages": MESSAGES}  # no messages: one, the prompt
ANSWER = PROMPT | {"answer": TEXT, "score": NUMBER} | ABOUT_QUESTION | _source_types("answer")
GAP = {
    "gap": NUMBER,
    "chosen_rank": INTEGER,
    "rejected_rank": INTEGER,
    "sampled_of": INTEGER,
    "chosen_older": pa.bool_(),
}
PAIR = PROMPT | {"chosen": TEXT, "rejected": TEXT, "chosen_score": NUMBER, "rejected_score": NUMBER} | GAP
PAIR |= ABOUT_QUESTION | _source_types("chosen") | _source_types("rejected")
RANKED = PROMPT | {
    "answers": TEXTS,
    "scores": pa.list_(NUMBER),
    "ranks": pa.list_(INTEGER),
    "ages": pa.list_(INTEGER),
    "best": INTEGER,
}
RANKED |= ABOUT_QUESTION | _source_types("answer", TEXTS)
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "finetune": ANSWER,
    "corpus": ANSWER,
    "reward": PAIR,
    "reward_groups": RANKED,
    "rl": PROMPT | ABOUT_QUESTION,
    "evaluation": RANKED,
    "evaluation_pairs": PAIR,
}

Columns = dict[str, pa.Array]  # by name


def build_tables(questions: Questions, split: str, pairs: Indices, num_pairs: Indices) -> dict[str, Columns]:
    """Return the rows, in columns, that the questions of a split add to tables, by the tables' names.

    ``pairs`` [k, 2] are drawn from ``num_pairs`` [n] comparisons of each question.
    """
    if split == "rl":
        return {"rl": _prompt_columns(questions, np.arange(len(questions.compared)))}
    if split == "finetune":
        best = order_by_preference(questions)[questions.starts[:-1]]
        corpus = np.arange(len(questions.answers))
        return {"finetune": _answer_columns(questions, best), "corpus": _answer_columns(questions, corpus)}
    pair_columns = build_pair_columns(questions, pairs, num_pairs)
    if split == "evaluation":
        return {"evaluation": _ranked_columns(questions), "evaluation_pairs": pair_columns}
    has_pairs = np.zeros(len(questions.compared), dtype=bool)
    has_pairs[questions.owners[pairs[:, 0]]] = True
    return {"reward": pair_columns, "reward_groups": _ranked_columns(select(questions, has_pairs))}


def build_pair_columns(questions: Questions, pairs: Indices, num_pairs: Indices) -> Columns:
    """Return the rows of comparisons [k, 2] in columns."""
    owners = questions.owners[pairs[:, 0]]
    columns = _prompt_columns(questions, owners) | {"sampled_of": pa.array(num_pairs[owners])}
    ranks, scores = rank_scores(questions), questions.number("score")
    for role, rows in (("chosen", pairs[:, 0]), ("rejected", pairs[:, 1])):
        answers = questions.answers.take(pa.array(rows))
        columns |= {role: answers.column("text"), f"{role}_score": answers.column("score")}
        columns |= {f"{role}_rank": pa.array(ranks[rows])} | _source_columns(role, answers)
    is_older, is_known = compare_ages(questions, pairs)
    columns["chosen_older"] = pa.array(is_older, mask=~is_known)
    return columns | {"gap": pa.array(scores[pairs[:, 0]] - scores[pairs[:, 1]])}


def _prompt_columns(questions: Questions, rows: Indices) -> Columns:
    about = questions.about.take(pa.array(rows))
    names = PROMPT.keys() | ABOUT_QUESTION.keys()
    return {name: about.column(name.removeprefix("question_")) for name in names}


def _source_columns(role: str, batch: pa.RecordBatch) -> Columns:
    return {f"{role}_{name}": batch.column(name) for name in SOURCE}


def _answer_columns(questions: Questions, rows: Indices) -> Columns:
    answers = questions.answers.take(pa.array(rows))
    columns = {"answer": answers.column("text"), "score": answers.column("score")}
    return _prompt_columns(questions, questions.owners[rows]) | columns | _source_columns("answer", answers)


def _ranked_columns(questions: Questions) -> Columns:
    """Return rows with all answers by id, so that their order says nothing about quality."""

    def as_lists(values: pa.Array, mask: Mask | None = None) -> pa.Array:
        nulls = None if mask is None else pa.array(mask)
        return pa.LargeListArray.from_arrays(pa.array(questions.starts), values, mask=nulls)

    answers, starts = questions.answers, questions.starts
    ages, has_ages = rank_ages(questions)
    best = order_by_preference(questions)[starts[:-1]] - starts[:-1]
    columns = {"answers": answers.column("text"), "scores": answers.column("score")}
    columns |= {"ranks": pa.array(rank_scores(questions))} | _source_columns("answer", answers)
    lists = {name: as_lists(values) for name, values in columns.items()}
    lists |= {"ages": as_lists(pa.array(ages), ~has_ages), "best": pa.array(best)}
    return _prompt_columns(questions, np.arange(len(starts) - 1)) | lists


def write_part(name: str, columns: Columns, path: Path) -> None:
    """Write a part of a table as an Arrow file."""
    schema = pa.schema(COLUMNS[name].items())
    table = pa.Table.from_arrays([columns[field.name].cast(field.type) for field in schema], schema=schema)
    with replacing(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)


class Table:
    """A parquet file to which parts are added.

    Its bytes do not depend on how rows were cut into parts, nor on defaults that change between versions of
    pyarrow.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.schema = pa.schema(COLUMNS[name].items())
        dictionary_columns = [column for column in self.schema.names if FEW_VALUES.fullmatch(column)]
        self.writer = pq.ParquetWriter(
            path,
            self.schema,
            version="2.6",
            compression="zstd",
            compression_level=3,
            use_dictionary=dictionary_columns,
            write_statistics=True,
        )
        self.pending: list[pa.Table] = []
        self.rows = 0

    def close(self) -> None:
        """Write the remaining rows and the footer."""
        self._write(all=True)
        self.writer.close()

    def add(self, part: Path) -> None:
        """Add the rows of a part that ``write_part`` wrote."""
        with pa.OSFile(str(part), "rb") as file:
            table = pa.ipc.open_file(file).read_all()
        self.pending.append(table)
        self.rows += table.num_rows
        self._write()

    def _write(self, *, all: bool = False) -> None:
        count = sum(part.num_rows for part in self.pending)
        if not count or (count < ROW_GROUP and not all):
            return
        rows = pa.concat_tables(self.pending)
        start = 0
        while count - start >= ROW_GROUP or (all and start < count):
            self.writer.write_table(rows.slice(start, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
            start += ROW_GROUP
        self.pending = [rows.slice(start).combine_chunks()] if start < count else []
