"""Read documents that are trained on packed side by side, and check that a model keeps them apart."""

from functools import partial

import pyarrow.parquet as pq
from transformers import PreTrainedModel

from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import layout_checks
from tasks.rlhf.batches.packing import Blocks, Document
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import fsdp


def read_finetune_split(run: Run, encoder: Encoder, *, answers_only: bool) -> list[Document]:
    """Return each question with its best answer as token ids, and which of them the loss counts."""
    documents, report_progress = [], run.phase("tokenising")
    rows = pq.read_table(run.inputs["data"] / "finetune.parquet", columns=["prompt", "answer"]).to_pylist()
    for number, row in enumerate(rows, 1):
        prompt, answer = encoder.encode_prompt(row["prompt"]), encoder.encode_answer(row["answer"])
        counted = [not answers_only] * len(prompt) + [True] * len(answer)
        documents.append(Document(prompt + answer, counted))
        report_progress(number, len(rows))
    return documents


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
