"""Read documents that are trained on packed side by side, and check that a model keeps them apart."""

from functools import partial
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel

from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.cache import Rows, Source, load_tokens
from tasks.programs.token_tables.token_table import TokenTable, to_lists
from tasks.rlhf.batches import layout_checks
from tasks.rlhf.batches.packing import Document, PackedDocuments
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import fsdp

SCHEMA = pa.schema({"ids": pa.list_(pa.int32()), "target": pa.list_(pa.bool_())})


def read_finetune_split(run: Run, encoder: Encoder, *, answers_only: bool) -> TokenTable[Document]:
    """Return each question with its best answer as token ids, and which of them the loss counts."""
    source = Source(
        table=run.inputs["data"] / "finetune.parquet",
        columns=["prompt", "answer"],
        group_by=None,
        encode=partial(_encode, answers_only=answers_only),
        module=__name__,
        encoders="tasks.rlhf.batches.truncation",
        settings={"answers_only": answers_only},
    )
    return load_tokens(run, source, encoder, _decode, phase="tokenising")


def _encode(encoder: Encoder, rows: Rows, *, answers_only: bool) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {"ids": [], "target": []}
    for row in rows:
        prompt, answer = encoder.encode_prompt(row["prompt"]), encoder.encode_answer(row["answer"])
        columns["ids"].append(prompt + answer)
        columns["target"].append([not answers_only] * len(prompt) + [True] * len(answer))
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _decode(batch: pa.RecordBatch) -> list[Document]:
    return [*map(Document, to_lists(batch["ids"]), to_lists(batch["target"]))]


def document_lengths(documents: TokenTable[Document]) -> list[int]:
    """Return the number of tokens of each document."""
    return documents.lengths("ids")


def measure_packing_leak(base: PreTrainedModel, run: Run, *parts: PackedDocuments) -> float:
    """Return the largest difference between hidden states of packed documents and of each alone, relative to
    their size.

    A model that does not keep packed documents apart computes each alone from now on. Raises InputError if
    even that differs.
    """
    hardest = [part.hardest() for part in parts]
    measure = partial(fsdp.with_full_weights, base, layout_checks.packing_gap, *hardest)
    gap, warning = layout_checks.check_layout(base, measure, layout="Packing several documents in a row")
    if warning:
        run.warn(warning)
    return gap.hidden
