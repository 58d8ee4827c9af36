"""Compute the SFT model's log-probability of every answer that DPO compares, once and before DPO.

python -m tasks.programs.reference DIR

inputs: data, model (the merged SFT model)
artifact: reference.parquet (the reward split's answers), reference_evaluation.parquet (the evaluation
    split's), summary.json
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from tasks.config.jobs import ReferenceJob
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import ReportProgress, Run, main
from tasks.programs.token_tables.questions import answer_keys, read_evaluation, read_pairs, text_lengths
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.compute import devices
from tasks.rlhf.models import loading
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite

ANSWERS = 64  # at a time, unless machine.micro_batch is set
PROGRESS_BATCHES = 32  # between two progress reports
COLUMNS = {"question_id": pa.int64(), "answer": pa.int64(), "tokens": pa.int64(), "log_prob": pa.float64()}


@torch.no_grad()
def compute(job: ReferenceJob, run: Run) -> None:
    """Compute the log-probability of each answer in the pairs of the reward and evaluation splits."""
    # 1. Questions with their answers, and the model.
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    base = training_setup.load_base(run, "model", job.weights.merged, job.text, device)
    encoder = pair_tables.build_encoder(job.text, tokenizer, {})
    questions = read_pairs(run, run.inputs["data"] / "reward.parquet", encoder)
    evaluation = read_evaluation(run, run.inputs["data"] / "evaluation_pairs.parquet", encoder)
    pad_id = tokenizer.pad_token_id
    training_setup.check_prompt_sharing(run, base, questions, evaluation, pad_id=pad_id)

    # 2. Log-probabilities; the program starts over if it is killed.
    run.rewind(0)
    batch_size = run.machine.micro_batch or ANSWERS
    found = log_probs(base, questions, pad_id=pad_id, batch_size=batch_size, report_progress=run.log)
    table = _to_table(questions, found)
    pq.write_table(table, run.artifact / "reference.parquet")
    report_progress = run.phase("evaluation answers")
    found = log_probs(base, evaluation, pad_id=pad_id, batch_size=batch_size, report_progress=report_progress)
    pq.write_table(_to_table(evaluation, found), run.artifact / "reference_evaluation.parquet")

    # 3. The summary.
    per_token = sum(table["log_prob"].to_pylist()) / sum(table["tokens"].to_pylist())
    run.finish({"reference.log_prob": per_token}, answers=len(table), questions=len(questions))


def _to_table(questions: TokenTable[Comparison], found: dict[int, list[float]]) -> pa.Table:
    values = [value for id in questions.column("question_id") for value in found[id]]
    return pa.Table.from_pydict({**answer_keys(questions), "log_prob": values}, schema=pa.schema(COLUMNS))


@torch.no_grad()
def log_probs(
    base: PreTrainedModel,
    questions: TokenTable[Comparison],
    *,
    pad_id: int,
    batch_size: int = ANSWERS,
    report_progress: ReportProgress,
) -> dict[int, list[float]]:
    """Return the log-probability of each answer by question; ``batch_size`` answers at a time.

    Raises InputError if one is not finite.
    """
    by_length = questions.select(np.argsort(text_lengths(questions), kind="stable"))  # little padding
    _, num_answers = by_length.nested_lengths("answers")
    found: dict[int, list[float]] = {}
    parts = comparisons.micro_batches(by_length, batch_size, num_answers=num_answers.tolist())
    for number, part in enumerate(map(list, parts), 1):
        batch = comparisons.collate(
            part, pad_id=pad_id, device=base.device, hidden_size=base.config.hidden_size
        )
        log_probs = shared_prompt.log_probs(base, batch.inputs)
        check_finite({"the reference's log-probability": log_probs}, advice=UNSOUND_MODEL)
        values = iter(log_probs.tolist())
        found |= {question.question_id: [next(values) for _ in question.answers] for question in part}
        if number % PROGRESS_BATCHES == 0 or number == len(parts):
            report_progress(number, len(parts))
    return found


if __name__ == "__main__":
    main(compute, ReferenceJob)
