"""Read documents that are trained on packed side by side, and check that a model keeps them apart."""

from functools import partial
from typing import Literal

import pyarrow.parquet as pq
from transformers import PreTrainedModel

from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import layout_checks
from tasks.rlhf.batches.packing import Blocks, Document
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import fsdp

LossOn = Literal["every", "last", "all"]


def read_finetune_split(run: Run, encoder: Encoder, *, loss_on: LossOn) -> list[Document]:
    """Return each question with its best answer as token ids, and which of them the loss counts.

    These are the answer's and, with "every", those of a conversation's earlier answers; with "all" all.
    """
    documents, report_progress = [], run.phase("tokenising")
    rows = pq.read_table(run.inputs["data"] / "finetune.parquet", columns=["prompt", "answer"]).to_pylist()
    for number, row in enumerate(rows, 1):
        documents.append(encode_document(encoder, row["prompt"], row["answer"], loss_on=loss_on))
        report_progress(number, len(rows))
    return documents


def encode_document(encoder: Encoder, prompt: str, answer: str, *, loss_on: LossOn) -> Document:
    """Return a prompt with its answer as token ids, and which of them the loss counts."""
    if loss_on == "every":
        ids, counted = encoder.encode_turns(prompt)
    else:
        ids = encoder.encode_prompt(prompt)
        counted = [loss_on == "all"] * len(ids)
    reply = encoder.encode_answer(answer)
    return Document(ids + reply, counted + [True] * len(reply))


def measure_packing_leak(base: PreTrainedModel, run: Run, *parts: Blocks) -> float:
    """Return the largest difference between hidden states of packed documents and of each alone, relative to
    their size.

    A model that does not keep packed documents apart computes each alone from now on. Raises InputError if
    even that differs.
    """
    measure = partial(fsdp.with_full_weights, base, layout_checks.packing_gap, *parts)
    gap, warning = layout_checks.check_layout(base, measure, layout="Packing several documents in a row")
    if warning:
        run.warn(warning)
    return gap.hidden
