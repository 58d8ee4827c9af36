"""Read the prompts that PPO samples answers to, as token ids and as text."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from tasks.dataset.conversation import Messages, from_records
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.cache import Rows, Source, load_tokens
from tasks.programs.token_tables.token_table import TokenTable, to_lists
from tasks.rlhf.batches.truncation import Encoder, TruncationCounts

COUNTED = ("messages", "messages_dropped")  # of a conversation
TURN = pa.struct({"role": pa.string(), "content": pa.string()})
TEXTS = {"question": pa.string(), "turns": pa.list_(TURN)}
SCHEMA = pa.schema(
    {"ids": pa.list_(pa.int32()), "is_cut": pa.bool_()} | TEXTS | dict.fromkeys(COUNTED, pa.int32())
)


class Prompt(NamedTuple):
    """A prompt's token ids and text, and whether its question was truncated."""

    ids: list[int]
    is_cut: bool
    question: str
    turns: Messages  # the messages of a conversation; none for a question


def find_chats(prompts: Iterable[Prompt]) -> dict[str, Messages]:
    """Return the messages of those prompts that are conversations, by their text."""
    return {prompt.question: prompt.turns for prompt in prompts if prompt.turns}


def read_rl_split(run: Run, encoder: Encoder, *, rows: list[int]) -> TokenTable[Prompt]:
    """Return the prompts of some rows of the RL split, in their order; ``encoder`` counts these alone."""
    source = Source(
        table=run.inputs["data"] / "rl.parquet",
        columns=["prompt"],
        group_by=None,
        encode=_encode,
        module=__name__,
        encoders="tasks.rlhf.batches.truncation",
        settings={},
    )
    found = load_tokens(run, source, encoder.fresh(), _decode, phase="tokenising").select(rows)
    counts = {name: sum(found.column(name)) for name in COUNTED}
    encoder.count(TruncationCounts(prompts=len(found), prompts_cut=sum(found.column("is_cut")), **counts))
    return found


def _encode(encoder: Encoder, rows: Rows) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        before = encoder.cut
        columns["ids"].append(encoder.encode_prompt(row["prompt"]))
        columns["is_cut"].append(encoder.cut.prompts_cut > before.prompts_cut)
        columns["question"].append(row["prompt"])
        columns["turns"].append(row.get("messages") or [])
        for name in COUNTED:
            columns[name].append(getattr(encoder.cut, name) - getattr(before, name))
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _decode(batch: pa.RecordBatch) -> list[Prompt]:
    turns = map(from_records, batch["turns"].to_pylist())
    is_cut, questions = (batch[name].to_pylist() for name in ("is_cut", "question"))
    return [*map(Prompt, to_lists(batch["ids"]), is_cut, questions, turns)]
