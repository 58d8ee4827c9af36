"""Read documents that are trained on packed side by side, and check that a model keeps them apart."""

from functools import partial
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel

from tasks.config.sections.sft import LossOn
from tasks.programs.runtime.program import Run
from tasks.programs.token_tables.cache import Rows, Source, load_tokens
from tasks.programs.token_tables.token_table import TokenTable, to_lists
from tasks.rlhf.batches import layout_checks
from tasks.rlhf.batches.packing import Document, PackedDocuments
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import fsdp

SCHEMA = pa.schema({"ids": pa.list_(pa.int32()), "target": pa.list_(pa.bool_())})


def read_finetune_split(run: Run, encoder: Encoder, *, loss_on: LossOn) -> TokenTable[Document]:
    """Return each question with its best answer as token ids, and which of them the loss counts.

    These are the answer's and, with "every", those of a conversation's earlier answers; with "all" all.
    """
    source = Source(
        table=run.inputs["data"] / "finetune.parquet",
        columns=["prompt", "answer"],
        group_by=None,
        encode=partial(_encode, loss_on=loss_on),
        module=__name__,
        encoders="tasks.rlhf.batches.truncation",
        settings={"loss_on": loss_on},
    )
    return load_tokens(run, source, encoder, _decode, phase="tokenising")


def encode_document(encoder: Encoder, prompt: str, answer: str, *, loss_on: LossOn) -> Document:
    """Return a prompt with its answer as token ids, and which of them the loss counts."""
    if loss_on == "every":
        ids, counted = encoder.encode_turns(prompt)
    else:
        ids = encoder.encode_prompt(prompt)
        counted = [loss_on == "all"] * len(ids)
    reply = encoder.encode_answer(answer)
    return Document(ids + reply, counted + [True] * len(reply))


def _encode(encoder: Encoder, rows: Rows, *, loss_on: LossOn) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {"ids": [], "target": []}
    for row in rows:
        document = encode_document(encoder, row["prompt"], row["answer"], loss_on=loss_on)
        columns["ids"].append(document.ids)
        columns["target"].append(document.target)
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
