"""What the SFT model thinks of every answer that DPO compares: the reference's log-probabilities, computed once.

python -m tasks.programs.reference DIR        inputs: data, model
artifact: reference.parquet (the reward split's answers), reference_evaluation.parquet (the evaluation split's), summary.json
"""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import ReferenceJob
from tasks.config.models import Text
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices
from tasks.rlhf.models import loading
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite
from tasks.system.errors import InputError

ANSWERS = 64  # at a time, unless machine.micro_batch says fewer
BATCHES = 32  # between two lines of progress
COLUMNS = {"question_id": pa.int64(), "answer": pa.int64(), "tokens": pa.int64(), "log_prob": pa.float64()}


@torch.no_grad()
def compute(job: ReferenceJob, run: Run) -> None:
    """Log-probability of each answer of the reward split's pairs and of the evaluation split's."""
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    base = training_setup.base(run, "model", job.weights.merged, job.text, device)
    questions, encoder = read(run, job.text, tokenizer), pair_tables.encoder_of(job.text, tokenizer)
    evaluation = pair_tables.read_evaluation(run.inputs["data"] / "evaluation_pairs.parquet", run, encoder)
    training_setup.share_prompts(run, base, [*questions, *evaluation], pad_id=tokenizer.pad_token_id)
    run.rewind(0)
    computing = {"pad_id": tokenizer.pad_token_id, "most": run.machine.micro_batch or ANSWERS}
    rows = _rows(questions, log_probs(base, questions, told=run.log, **computing))
    _write(rows, run.artifact / "reference.parquet")
    more = _rows(evaluation, log_probs(base, evaluation, told=run.phase("evaluation answers"), **computing))
    _write(more, run.artifact / "reference_evaluation.parquet")
    per_token = sum(row[3] for row in rows) / sum(row[2] for row in rows)
    run.finish({"reference.log_prob": per_token}, answers=len(rows), questions=len(questions))


def _rows(questions: list[Comparison], found: dict[int, list[float]]) -> list[tuple[int, int, int, float]]:
    return [
        (c.question_id, i, len(answer), found[c.question_id][i])
        for c in questions
        for i, answer in enumerate(c.answers)
    ]


def _write(rows: list[tuple[int, int, int, float]], path: Path) -> None:
    columns = [pa.array([row[place] for row in rows], kind) for place, kind in enumerate(COLUMNS.values())]
    pq.write_table(pa.Table.from_arrays(columns, names=list(COLUMNS)), path)


@torch.no_grad()
def log_probs(
    base: PreTrainedModel,
    questions: list[Comparison],
    *,
    pad_id: int,
    most: int = ANSWERS,
    told: Callable[[int, int], None] | None = None,
) -> dict[int, list[float]]:
    """Log-probability of each answer by question; ``most`` answers at a time, and now and then ``told`` of so many batches of all."""
    by_length = sorted(questions, key=lambda c: len(c.prompt) + sum(map(len, c.answers)))  # little padding
    found: dict[int, list[float]] = {}
    parts = comparisons.micro_batches(by_length, most)
    for number, part in enumerate(parts, 1):
        batch = comparisons.collate(
            part, pad_id=pad_id, device=base.device, hidden_size=base.config.hidden_size
        )
        log_probs = shared_prompt.log_probs(base, batch.inputs)
        check_finite({"the reference's log-probability": log_probs}, advice=UNSOUND_MODEL)
        values = iter(log_probs.tolist())
        found |= {c.question_id: [next(values) for _ in c.answers] for c in part}
        if told and (number % BATCHES == 0 or number == len(parts)):
            told(number, len(parts))
    return found


def read(
    run: Run, text: Text, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None = None
) -> list[Comparison]:
    """The reward split's pairs by question; ``encoder`` counts what is cut. Raises InputError where there are none."""
    texts = pair_tables.texts_of(run.inputs["data"] / "reward.parquet")
    if not texts:
        raise InputError("The reward split has no pairs: raise data.reward_share or give more data.")
    return pair_tables.encode(run, texts, encoder or pair_tables.encoder_of(text, tokenizer))


if __name__ == "__main__":
    main(compute, ReferenceJob)
