"""Define the data stage's tables, build their rows from questions, and write them as parquet.

The bytes of a file depend on its rows alone.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.conversation import to_records
from tasks.dataset.question import Answer, Pair, Question, age_ranks, index_of_best, is_older, ranks
from tasks.system.files import replacing

TEXT, INTEGER, NUMBER, TEXTS = pa.string(), pa.int32(), pa.float64(), pa.list_(pa.string())
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
ABOUT_QUESTION = {"site": TEXT}
ROW_GROUP = 8_192  # rows
FEW_VALUES = re.compile("site|.*_licence")  # columns that a dictionary encodes well


def _source_types(role: str, kind: pa.DataType = TEXT) -> dict[str, pa.DataType]:
    return {f"{role}_{name}": kind for name in ("url", "author", "author_name", "licence")}


ABOUT_QUESTION |= _source_types("question")
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

Fields = dict[str, Any]


def build_rows(
    question: Question, split: str, pairs: Sequence[Pair], sampled_of: int
) -> Iterator[tuple[str, Fields]]:
    """Yield (table, row) for every row that a question of this split adds to a table."""
    answers = question.answers
    if split == "finetune":
        yield "finetune", _answer_row(question, answers[index_of_best(answers)])
        yield from (("corpus", _answer_row(question, answer)) for answer in answers)
    elif split == "rl":
        yield "rl", _prompt_columns(question)
    else:
        if split == "evaluation" or pairs:
            yield "evaluation" if split == "evaluation" else "reward_groups", _ranked_row(question)
        name = "evaluation_pairs" if split == "evaluation" else split
        answer_ranks = ranks(answers)
        yield from ((name, build_pair_row(question, pair, sampled_of, answer_ranks)) for pair in pairs)


def build_pair_row(question: Question, pair: Pair, sampled_of: int, answer_ranks: Sequence[int]) -> Fields:
    """Return the row of a comparison, one of ``sampled_of`` that it was drawn from."""
    chosen, rejected = (question.answers[place] for place in pair)
    row = {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    row |= {"gap": chosen.score - rejected.score, "sampled_of": sampled_of}
    row |= {"chosen_older": is_older(chosen, rejected)}
    row |= {"chosen_rank": answer_ranks[pair[0]], "rejected_rank": answer_ranks[pair[1]]}
    return (
        _prompt_columns(question)
        | row
        | _source_columns("chosen", chosen)
        | _source_columns("rejected", rejected)
    )


def _prompt_columns(question: Question) -> Fields:
    prompt = {"prompt": question.prompt, "messages": to_records(question.messages)}
    about = {"question_id": question.id, "site": question.site}
    return about | prompt | _source_columns("question", question)


def _source_columns(role: str, text: Question | Answer) -> Fields:
    return {
        f"{role}_url": text.url,
        f"{role}_author": text.author,
        f"{role}_author_name": text.author_name,
        f"{role}_licence": text.licence,
    }


def _answer_row(question: Question, answer: Answer) -> Fields:
    return (
        _prompt_columns(question)
        | {"answer": answer.text, "score": answer.score}
        | _source_columns("answer", answer)
    )


def _ranked_row(question: Question) -> Fields:
    """Return a row with all answers by id, so that their order says nothing about quality."""
    answers = question.answers
    sources = [_source_columns("answer", answer) for answer in answers]
    row = {
        "answers": [a.text for a in answers],
        "scores": [a.score for a in answers],
        "ranks": ranks(answers),
        "ages": age_ranks(answers),
    }
    row["best"] = index_of_best(answers)
    columns = {name: [source[name] for source in sources] for name in sources[0]}
    return _prompt_columns(question) | row | columns


def write_part(name: str, rows: list[Fields], path: Path) -> None:
    """Write a part of a table as an Arrow file."""
    schema = pa.schema(COLUMNS[name].items())
    columns = [pa.array([row[column.name] for row in rows], column.type) for column in schema]
    with replacing(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))


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
