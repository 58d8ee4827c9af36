"""The data stage's tables: their columns, the rows that a question gives, and files whose bytes depend on the rows alone."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.question import Answer, Pair, Question, age_ranks, index_of_best, is_older, ranks
from tasks.system.files import replacing

TEXT, INTEGER, NUMBER, TEXTS = pa.string(), pa.int32(), pa.float64(), pa.list_(pa.string())
ABOUT_QUESTION = {"site": TEXT}
ROWS = 8_192  # of a row group
REPEATED = re.compile("site|.*_licence")  # columns of few different values


def _about(role: str, kind: pa.DataType = TEXT) -> dict[str, pa.DataType]:
    return {f"{role}_{name}": kind for name in ("url", "author", "author_name", "licence")}


ABOUT_QUESTION |= _about("question")
PROMPT = {"question_id": pa.int64(), "prompt": TEXT}
ANSWER = PROMPT | {"answer": TEXT, "score": NUMBER} | ABOUT_QUESTION | _about("answer")
PROOF = {
    "gap": NUMBER,
    "chosen_rank": INTEGER,
    "rejected_rank": INTEGER,
    "sampled_of": INTEGER,
    "chosen_older": pa.bool_(),
}
PAIR = PROMPT | {"chosen": TEXT, "rejected": TEXT, "chosen_score": NUMBER, "rejected_score": NUMBER} | PROOF
PAIR |= ABOUT_QUESTION | _about("chosen") | _about("rejected")
RANKED = PROMPT | {
    "answers": TEXTS,
    "scores": pa.list_(NUMBER),
    "ranks": pa.list_(INTEGER),
    "ages": pa.list_(INTEGER),
    "best": INTEGER,
}
RANKED |= ABOUT_QUESTION | _about("answer", TEXTS)
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
    """(table, row) of everything that a question of this split gives."""
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
        standing = ranks(answers)
        yield from ((name, build_pair_row(question, pair, sampled_of, standing)) for pair in pairs)


def build_pair_row(question: Question, pair: Pair, sampled_of: int, standing: Sequence[int]) -> Fields:
    """A comparison, one of ``sampled_of`` that were there to draw from; ``standing`` has the answers' ranks."""
    chosen, rejected = (question.answers[place] for place in pair)
    row = {
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }
    row |= {"gap": chosen.score - rejected.score, "sampled_of": sampled_of}
    row |= {"chosen_older": is_older(chosen, rejected)}
    row |= {"chosen_rank": standing[pair[0]], "rejected_rank": standing[pair[1]]}
    return (
        _prompt_columns(question)
        | row
        | _source_columns("chosen", chosen)
        | _source_columns("rejected", rejected)
    )


def _prompt_columns(question: Question) -> Fields:
    return {"question_id": question.id, "prompt": question.prompt, "site": question.site} | _source_columns(
        "question", question
    )


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
    """All answers in the order of their ids, so that a place in the list says nothing about quality."""
    answers = question.answers
    sources = [_source_columns("answer", answer) for answer in answers]
    row = {
        "answers": [a.text for a in answers],
        "scores": [a.score for a in answers],
        "ranks": ranks(answers),
        "ages": age_ranks(answers),
    }
    row["best"] = index_of_best(answers)
    return (
        _prompt_columns(question) | row | {name: [source[name] for source in sources] for name in sources[0]}
    )


def write_part(name: str, rows: list[Fields], path: Path) -> None:
    """Rows of a table on their way to its file."""
    schema = pa.schema(COLUMNS[name].items())
    columns = [pa.array([row[column.name] for row in rows], column.type) for column in schema]
    with replacing(path) as new, pa.OSFile(str(new), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=schema))


class Table:
    """A parquet file to which parts are added. How rows were cut into parts cannot be seen in it, nor are the library's defaults of the day."""

    def __init__(self, name: str, path: Path) -> None:
        self.schema = pa.schema(COLUMNS[name].items())
        few = [column for column in self.schema.names if REPEATED.fullmatch(column)]
        self.writer = pq.ParquetWriter(
            path,
            self.schema,
            version="2.6",
            compression="zstd",
            compression_level=3,
            use_dictionary=few,
            write_statistics=True,
        )
        self.held: list[pa.Table] = []
        self.rows = 0

    def close(self) -> None:
        self._write(all=True)
        self.writer.close()

    def add(self, part: Path) -> None:
        with pa.OSFile(str(part), "rb") as file:
            found = pa.ipc.open_file(file).read_all()
        self.held.append(found)
        self.rows += found.num_rows
        self._write()

    def _write(self, *, all: bool = False) -> None:
        count = sum(part.num_rows for part in self.held)
        if not count or (count < ROWS and not all):
            return
        whole = pa.concat_tables(self.held)
        start = 0
        while count - start >= ROWS or (all and start < count):
            self.writer.write_table(whole.slice(start, ROWS).combine_chunks(), row_group_size=ROWS)
            start += ROWS
        self.held = [whole.slice(start).combine_chunks()] if start < count else []
