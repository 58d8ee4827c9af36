"""What the SFT model thinks of every answer that DPO compares: the reference's log-probabilities, computed once.

python -m tasks.programs.reference DIR        inputs: data, model        artifact: reference.parquet, summary.json
"""

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.programs import beginning
from tasks.programs.config import InputError, ReferenceJob, Text
from tasks.programs.entry import Run, main
from tasks.rlhf import branches, comparisons, devices, models
from tasks.rlhf.comparisons import Comparison
from tasks.rlhf.finite import UNSOUND_MODEL, check_finite

ANSWERS = 64  # at a time, unless machine.micro_batch says fewer
BATCHES = 32  # between two lines of progress
COLUMNS = ("question_id", "answer", "tokens", "log_prob")


@torch.no_grad()
def compute(job: ReferenceJob, run: Run) -> None:
    """Log-probability of each answer of the reward split."""
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = models.load_tokenizer(run.inputs["model"])
    base = beginning.base(run, "model", job.weights.merged, job.text, device)
    questions = read(run, job.text, tokenizer)
    beginning.share_prompts(run, base, questions, pad_id=tokenizer.pad_token_id)
    run.rewind(0)
    found = log_probs(base, questions, pad_id=tokenizer.pad_token_id, most=run.machine.micro_batch or ANSWERS, told=run.log)
    rows = [(c.question_id, i, len(answer), found[c.question_id][i]) for c in questions for i, answer in enumerate(c.answers)]
    table = pa.table(dict(zip(COLUMNS, zip(*rows, strict=True), strict=True)))
    pq.write_table(table, run.artifact / "reference.parquet")
    per_token = sum(row[3] for row in rows) / sum(row[2] for row in rows)
    run.finish({"reference.log_prob": per_token}, answers=len(rows), questions=len(questions))


@torch.no_grad()
def log_probs(
    base: PreTrainedModel, questions: list[Comparison], *, pad_id: int, most: int = ANSWERS, told: Callable[[int, int], None] | None = None
) -> dict[int, list[float]]:
    """Log-probability of each answer by question; ``most`` answers at a time, and now and then ``told`` of so many batches of all."""
    by_length = sorted(questions, key=lambda c: len(c.prompt) + sum(map(len, c.answers)))  # little padding
    found: dict[int, list[float]] = {}
    parts = comparisons.micro_batches(by_length, most)
    for number, part in enumerate(parts, 1):
        batch = comparisons.collate(part, pad_id=pad_id, device=base.device, hidden_size=base.config.hidden_size)
        log_probs = branches.log_probs(base, batch.branches)
        check_finite({"the reference's log-probability": log_probs}, advice=UNSOUND_MODEL)
        values = iter(log_probs.tolist())
        found |= {c.question_id: [next(values) for _ in c.answers] for c in part}
        if told and (number % BATCHES == 0 or number == len(parts)):
            told(number, len(parts))
    return found


def read(run: Run, text: Text, tokenizer: PreTrainedTokenizerBase) -> list[Comparison]:
    """The reward split's pairs by question. Raises InputError where there are none."""
    rows = pq.read_table(run.inputs["data"] / "reward.parquet", columns=comparisons.PAIR_COLUMNS).to_pylist()
    if not rows:
        raise InputError("The reward split has no pairs: raise data.reward_share or give more data.")
    lengths = {"max_prompt_tokens": text.max_prompt_tokens, "max_answer_tokens": text.max_answer_tokens}
    return comparisons.encode(comparisons.from_pairs(rows), tokenizer, template=text.template, **lengths)


if __name__ == "__main__":
    main(compute, ReferenceJob)
