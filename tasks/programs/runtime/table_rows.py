"""Read some rows of a table, and the messages of prompts that are conversations."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tasks.dataset.conversation import from_records
from tasks.rlhf.batches.conversations import Messages

BATCH_ROWS = 4096  # of a table at a time


def read_rows(table: Path, places: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows with these numbers, in this order; of the others only a batch at a time is in memory.

    Columns that the table lacks are left out.
    """
    wanted = np.asarray(places, dtype=np.int64)
    rows: dict[int, dict[str, Any]] = {}
    with pq.ParquetFile(table) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        start = 0
        for number in range(file.num_row_groups):
            end = start + file.metadata.row_group(number).num_rows
            if np.any((wanted >= start) & (wanted < end)):
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[number], columns=present):
                    own = wanted[(wanted >= start) & (wanted < start + len(batch))]
                    found = batch.take(pa.array(own - start)).to_pylist()
                    rows.update(zip(own.tolist(), found, strict=True))
                    start += len(batch)
            start = end
    return [rows[place] for place in wanted.tolist()]


def chats_of(rows: Iterable[dict[str, Any]]) -> dict[str, Messages]:
    """Return the messages of those rows whose prompts are conversations, by the prompt's text."""
    return {row["prompt"]: from_records(row["messages"]) for row in rows if row.get("messages")}


def read_chats(*tables: Path) -> dict[str, Messages]:
    """Return the messages of all prompts of tables that are conversations, by the prompt's text.

    Tables that are not there have none. If only some rows are used, `read_rows` and `chats_of` hold less.
    """
    chats: dict[str, Messages] = {}
    for batch in _iter_chats(*tables):
        chats |= chats_of(batch.to_pylist())
    return chats


def has_chats(*tables: Path) -> bool:
    """Return whether a prompt of one of the tables is a conversation."""
    return any(len(batch) for batch in _iter_chats(*tables))


def _iter_chats(*tables: Path) -> Iterator[pa.RecordBatch]:
    """Yield prompts and messages of the rows that are conversations, a batch at a time."""
    for table in filter(Path.exists, tables):
        with pq.ParquetFile(table) as file:
            names = file.schema_arrow.names
            prompt = "prompt" if "prompt" in names else "question"
            wanted = {"row_groups": _groups_with_chats(file), "columns": [prompt, "messages"]}
            for batch in file.iter_batches(batch_size=BATCH_ROWS, **wanted):
                is_chat = pc.greater(pc.fill_null(pc.list_value_length(batch["messages"]), 0), 0)
                columns = {"prompt": batch[prompt], "messages": batch["messages"]}
                yield pa.RecordBatch.from_pydict(columns).filter(is_chat)


def _groups_with_chats(file: pq.ParquetFile) -> list[int]:
    """Return the row groups that hold messages, by their statistics: most tables have none."""
    paths = [file.metadata.schema.column(number).path for number in range(file.metadata.num_columns)]
    roles = [number for number, path in enumerate(paths) if re.fullmatch(r"messages\..*\.role", path)]
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    statistics = {n: group.column(number).statistics for number in roles for n, group in enumerate(groups)}
    return [n for n, found in statistics.items() if found is None or found.has_min_max]
