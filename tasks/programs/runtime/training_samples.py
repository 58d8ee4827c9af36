"""Answer the same held-out questions now and then while a policy trains, for people to read.

Training is not changed: the answers are drawn by numbers of their own. These depend on the question alone, so
answers differ from step to step only because the weights do, and DPO and PPO begin with the same answers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import DpoJob, PpoJob, SftJob
from tasks.dataset import row_sample
from tasks.programs.runtime import pair_tables, table_rows, training_setup
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import rewards, schedules
from tasks.rlhf.batches import prompts, sampling, sequences
from tasks.rlhf.batches.conversations import Messages
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import fsdp
from tasks.rlhf.models.trainable import Active, Trainable
from tasks.system import torchrun

NUM_SAMPLES = 5  # unless the steps between them are set; with the one before the first step
DRAWS = "training samples"

# Returns (B,) scores of a batch, given which of its answers have ended (B,), the texts of its questions, and
# the messages of those that are conversations, by their text.
Score = Callable[[Sequences, Tensor, list[str], Mapping[str, Messages]], Tensor]


def build_sampler(
    job: SftJob | DpoJob, run: Run, tokenizer: PreTrainedTokenizerBase, tuned: Trainable, *, total: int
) -> "TrainingSampler | None":
    """Return the sampler of what is trained; None, with a warning, if sharded weights are trained."""
    settings = job.sft if isinstance(job, SftJob) else job.dpo
    is_sharded = training_setup.is_sharded(run, training_setup.stage_name(settings))
    if is_sharded and settings.tune == "full":
        if job.samples.prompts:
            run.warn("No answers were sampled during training: the weights are sharded over the processes.")
        return None

    def before() -> None:
        tuned.model.eval()

    return TrainingSampler(
        job,
        run,
        tokenizer,
        policy=tuned.active,
        reference=tuned.reference,
        total=total,
        before=before,
        is_sharded=is_sharded,
    )


class TrainingSampler:
    """Samples answers of a policy at some of its ``total`` steps, and records them in the run.

    ``policy`` and ``reference`` are contexts in which the two compute; without a reference the KL is unknown.
    ``score`` returns rewards, and ``before`` is called before the policy answers. ``is_sharded``: several
    processes share the weights.
    """

    def __init__(
        self,
        job: SftJob | DpoJob | PpoJob,
        run: Run,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: Active,
        reference: Active | None,
        total: int,
        score: Score | None = None,
        before: Callable[[], None] = lambda: None,
        is_sharded: bool = False,
    ) -> None:
        self.run, self.policy, self.reference, self.score, self.before = run, policy, reference, score, before
        self.is_sharded = is_sharded
        self.settings, every = job.samples, job.samples.every
        self.due = {0, total} | (
            set(range(0, total, every)) if every else schedules.evaluation_steps(total, NUM_SAMPLES - 1)
        )
        self.recorded = run.sampled_steps()
        rows = self._draw_rows()
        # not the stage's encoder, which counts what training truncates
        self.encoder = pair_tables.build_encoder(job.text, tokenizer, table_rows.chats_of(rows))
        self.end_ids = prompts.end_tokens(tokenizer, job.text.template)
        self.questions = [{"question_id": row["question_id"], "question": row["prompt"]} for row in rows]
        if rows:
            ids = [row["question_id"] for row in rows]
            self.prompts = [self.encoder.encode_prompt(row["prompt"]) for row in rows]
            self.uniform = sampling.uniform_numbers(job.seed, DRAWS, ids, self.encoder.max_answer_tokens)

    def _draw_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the questions, drawn by their ids; none if the data has no such table."""
        path = self.run.inputs["data"] / "evaluation.parquet"
        if not self.settings.prompts or not path.exists():
            return []
        ids = pq.read_table(path, columns=["question_id"])["question_id"].to_pylist()
        places = row_sample.draw_sample(ids, self.settings.prompts)
        return table_rows.read_rows(path, places, ["question_id", "prompt", "messages"])

    def __call__(self, step: int, *, is_last: bool = False) -> None:
        """Record answers of the weights after ``step`` steps, if that is due and was not done before.

        Of several processes the first answers, and the others go on to the next step. If they share the
        weights all answer, because a model's weights are gathered by all of them together.
        """
        if not self.questions or not (torchrun.is_first() or self.is_sharded):
            return
        if step in self.recorded or not (is_last or step in self.due):
            return
        self.before()
        rows = self.run.machine.micro_batch or len(self.questions)
        answers = []
        for first in range(0, len(self.questions), rows):
            answers += self._answer(slice(first, first + rows))
        if torchrun.is_first():
            self.run.record_sample(step, answers)
        self.recorded.add(step)

    @torch.no_grad()
    def _answer(self, rows: slice) -> list[dict[str, Any]]:
        """Return an answer to each of some questions, with length, KL in nats an answer, and reward."""
        questions, temperature = self.prompts[rows], self.settings.temperature
        tokenizer, template = self.encoder.tokenizer, self.encoder.template

        def log_probs(model: PreTrainedModel, batch: Sequences) -> Tensor:
            return fsdp.with_full_weights(model, sequences.log_probs, batch, temperature=temperature)

        with self.policy() as policy:
            samples = fsdp.with_full_weights(
                policy,
                sampling.sample,
                questions,
                max_tokens=self.encoder.max_answer_tokens,
                temperature=temperature,
                end_ids=self.end_ids,
                pad_id=tokenizer.pad_token_id,
                uniform=self.uniform[rows],
            )
            answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
            batch = sequences.join(questions, answers, pad_id=tokenizer.pad_token_id, device=policy.device)
            logp = log_probs(policy, batch) if self.reference else None
        ended = [answer[-1] in self.end_ids for answer in answers]
        columns: dict[str, list[Any]] = {
            "answer": [prompts.decode_answer(tokenizer, ids, template=template) for ids in answers],
            "length": [len(answer) for answer in answers],
            "ended": ended,
        }
        if self.reference and logp is not None:
            with self.reference() as reference:
                columns["kl"] = rewards.k1(logp - log_probs(reference, batch)).sum(dim=1).tolist()
        if self.score:
            texts = [row["question"] for row in self.questions[rows]]
            has_ended = torch.tensor(ended, device=batch.input_ids.device)
            columns["reward"] = self.score(batch, has_ended, texts, self.encoder.chats).tolist()
        found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [question | row for question, row in zip(self.questions[rows], found, strict=True)]
