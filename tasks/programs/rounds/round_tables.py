"""Define the tables of rounds, and write them: equal rows give equal bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.tables import COLUMNS, MESSAGES, ROW_GROUP

TEXT, NUMBER, TEXTS = pa.string(), pa.float64(), pa.list_(pa.string())
QUESTION = {"question_id": pa.int64(), "prompt": TEXT, "messages": MESSAGES}
CANDIDATE = QUESTION | {
    "policy": TEXT,  # "sft", "policy" (the last round's), "policy2" (of the round before), ...
    "draw": pa.int32(),  # number of the policy's answer to the prompt
    "answer": TEXT,
    "tokens": pa.list_(pa.int32()),
    "ended": pa.bool_(),
    "rewards": pa.list_(pa.float32()),  # raw ones of the last reward model's members; empty without one
    "reward": pa.float32(),  # the members' combined and normalised, as PPO sees it; null without one
}
ASKED = {"pair_id": TEXT} | QUESTION | {
    "first": TEXT,
    "second": TEXT,
    "first_policy": TEXT,
    "second_policy": TEXT,
    "disagreement": NUMBER,  # of the members, 0 to 0.5; null without an ensemble
    "margin": NUMBER,  # reward of the first answer minus that of the second; null without a reward model
    "chosen_by": TEXT,  # "random", "disagreement" or "gold question"
    "known": TEXT,  # the better answer of a gold question, "first" or "second"; else ""
}  # fmt: skip
LABEL = {
    "label_id": TEXT,
    "pair_id": TEXT,
    "verdict": TEXT,  # "first", "second", "tie", "both_bad" or "skip"
    "rater": TEXT,
    "source": TEXT,  # "gold", "judge:lm", "judge:held_out", "file" or "people"
    "time": TEXT,  # UTC, ISO 8601; "" if no person labelled
    "seconds": NUMBER,
    "shown_first": TEXT,  # the answer that stood on the left, "first" or "second"
    "withdrawn": pa.bool_(),
    "why": TEXT,
}
COMPARISON = COLUMNS["reward"] | {"pair_id": TEXT, "origin": TEXT, "label_ids": TEXTS, "raters": TEXTS}
MIXTURE = COLUMNS["reward"] | {"pair_id": TEXT, "origin": TEXT}  # no pair_id: a vote


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, pa.DataType]) -> None:
    """Write rows as parquet; columns that a row lacks are null."""
    filled = [{name: row.get(name) for name in columns} for row in rows]
    write_table(path, pa.Table.from_pylist(filled, schema=pa.schema(columns.items())))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as parquet."""
    pq.write_table(table.combine_chunks(), path, version="2.6", compression="zstd", row_group_size=ROW_GROUP)
