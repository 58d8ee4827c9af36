"""Let the base model and every policy answer held-out questions.

python -m tasks.programs.answers DIR

inputs: data, base, model (the merged SFT model); ppo and dpo, if they were trained; predecessor (the policy
        of the round before), if there is one; champion and champion_model (a policy of an earlier run, and
        its merged SFT model), if there is one
artifact: answers.parquet (question_id, question and, of every policy, answer, tokens and KL), summary.json

A policy's answers depend on its own weights alone: not on which others are there, nor on who judges them.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import AnswersJob
from tasks.dataset import row_sample
from tasks.dataset.tables import MESSAGES
from tasks.programs.runtime import pair_tables, table_rows
from tasks.programs.runtime.policies import Models, load_base, load_champion, load_tuned, policy_names
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.algorithms import rewards
from tasks.rlhf.batches import prompts, sampling, sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, free_memory
from tasks.rlhf.evaluation import intervals
from tasks.rlhf.models import loading
from tasks.rlhf.models.trainable import Active
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite


def answer(job: AnswersJob, run: Run) -> None:
    """Sample an answer of each policy to each held-out question."""
    # 1. Questions. A killed program starts over.
    run.rewind(0)
    device = devices.set_up(run.machine.device, run.machine.threads)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    rows = read_questions(run.inputs["data"] / "evaluation.parquet", job.winrate.num_questions)
    chats = table_rows.read_chats(run.inputs["data"] / "evaluation.parquet")
    encoder = pair_tables.build_encoder(job.text, tokenizer, chats)
    columns: dict[str, Any] = {
        "question_id": [row["question_id"] for row in rows],
        "question": [row["prompt"] for row in rows],
        "messages": pa.array([row.get("messages") for row in rows], MESSAGES),
    }

    # 2. The SFT model and the policies, adapters on it; then the base model, when these have left the memory.
    names = ["sft", *policy_names(run), "base"]
    names += ["champion"] if job.champion else []
    sampler = Sampler(job, encoder, columns, len(names))
    found, metrics = sampler.answer_all(load_tuned(run, job.weights.merged, device), run)
    free_memory.release(device)
    columns |= found
    found, described = sampler.answer_all(load_base(run, job.weights.base, device), run)
    free_memory.release(device)
    columns |= found
    metrics |= described

    # 3. The champion, in the format in which it was trained.
    if job.champion:
        sampler = Sampler(job, champion_encoder(job, run, encoder), columns, len(names), done=sampler.done)
        found, described = sampler.answer_all(load_champion(run, job.champion.precision, device), run)
        columns |= found | {"champion.tokens": own_tokens(found, sampler.end_ids, encoder)}
        metrics |= described

    # 4. The artifact.
    pq.write_table(pa.table(columns), run.artifact / "answers.parquet")
    run.warnings += encoder.warnings()
    run.finish(metrics | encoder.metrics("answers"), policies=names, questions=len(rows))


def champion_encoder(job: AnswersJob, run: Run, encoder: Encoder) -> Encoder:
    """Return an encoder with the champion's tokenizer and prompts, and the limit of answers and the
    conversations of this run's ``encoder``.
    """
    assert job.champion is not None
    text = job.champion.text.model_copy(update={"max_answer_tokens": job.text.max_answer_tokens})
    return pair_tables.build_encoder(
        text, loading.load_tokenizer(run.inputs["champion_model"]), encoder.chats
    )


def own_tokens(found: dict[str, pa.Array], end_ids: tuple[int, ...], encoder: Encoder) -> pa.Array:
    """Return the champion's answers in the tokens of this run's model, as its reward model reads them.

    An answer that was cut off has no end token here either: it would count as one that has ended.
    """
    own_ends = prompts.end_tokens(encoder.tokenizer, encoder.template)
    answers = []
    pairs = zip(found["champion.answer"].to_pylist(), found["champion.tokens"].to_pylist(), strict=True)
    for text, sampled in pairs:
        ids = prompts.encode_answer(
            encoder.tokenizer, text, template=encoder.template, max_tokens=encoder.max_answer_tokens
        )
        has_end = len(ids) > 1 and ids[-1] in own_ends
        answers.append(ids[:-1] if has_end and sampled[-1] not in end_ids else ids)
    return pa.array(answers, pa.list_(pa.int32()))


def read_questions(path: Path, count: int) -> list[dict[str, Any]]:
    """Return at most ``count`` rows of the evaluation split, drawn by their ids, in the table's order."""
    table = pq.read_table(path)
    places = row_sample.draw_sample(table["question_id"].to_pylist(), count)
    rows: list[dict[str, Any]] = table.take(sorted(places)).to_pylist()
    return rows


class Sampler:
    """Samples answers of policies to the questions of ``columns``, in batches.

    ``done`` batches were logged before; ``num_policies`` will be asked in all.
    """

    def __init__(
        self,
        job: AnswersJob,
        encoder: Encoder,
        columns: dict[str, Any],
        num_policies: int,
        *,
        done: int = 0,
    ) -> None:
        self.seed, self.settings, self.num_policies, self.done = job.seed, job.winrate, num_policies, done
        self.max_tokens, self.encoder = encoder.max_answer_tokens, encoder
        self.end_ids = prompts.end_tokens(encoder.tokenizer, encoder.template)
        self.question_ids = columns["question_id"]
        self.questions = [encoder.encode_prompt(text) for text in columns["question"]]

    def answer_all(self, models: Models, run: Run) -> tuple[dict[str, pa.Array], dict[str, Any]]:
        """Return columns and metrics of all models' answers; ``models`` is empty afterwards."""
        columns: dict[str, pa.Array] = {}
        metrics: dict[str, Any] = {}
        for name in models.active:
            answers, kl = self.answers(name, models.active, run)
            columns |= build_columns(name, answers, kl, self.encoder)
            metrics |= describe_answers(name, answers, kl, self.end_ids)
        models.active.clear()
        return columns, metrics

    @torch.no_grad()
    def answers(
        self, name: str, policies: dict[str, Active], run: Run
    ) -> tuple[list[list[int]], list[float | None]]:
        """Return an answer of one policy to each question, and the KL estimate (k1) of each from the SFT
        model, in nats; None if that is not in the memory.

        Logs one step per batch, counted over all policies.
        """
        uniform = sampling.uniform_numbers(self.seed, name, self.question_ids, self.max_tokens)
        firsts = range(0, len(self.questions), self.settings.batch_size)
        answers: list[list[int]] = []
        divergences: list[float | None] = []
        for first in firsts:
            rows = slice(first, first + self.settings.batch_size)
            new, kl = self._sample(name, policies, self.questions[rows], uniform[rows])
            answers += new
            divergences += kl
            self.done += 1
            run.log(self.done, self.num_policies * len(firsts))
        return answers, divergences

    def _sample(
        self, name: str, policies: dict[str, Active], questions: list[list[int]], uniform: Tensor
    ) -> tuple[list[list[int]], list[float | None]]:
        temperature = self.settings.temperature
        with policies[name]() as policy:
            samples = sampling.sample(
                policy,
                questions,
                max_tokens=self.max_tokens,
                temperature=temperature,
                end_ids=self.end_ids,
                pad_id=self.encoder.tokenizer.pad_token_id,
                uniform=uniform,
            )
            answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
            batch = sequences.join(
                questions, answers, pad_id=self.encoder.tokenizer.pad_token_id, device=policy.device
            )
            logp = sequences.log_probs(policy, batch, temperature=temperature)
            check_finite({f"{name}'s log-probability of its own answer": logp}, advice=UNSOUND_MODEL)
        if name == "sft" or "sft" not in policies:
            return answers, [0.0 if name == "sft" else None] * len(answers)
        with policies["sft"]() as reference:
            ref_logp = sequences.log_probs(reference, batch, temperature=temperature)
        return answers, rewards.k1(logp - ref_logp).sum(dim=1).tolist()


def build_columns(
    name: str, answers: list[list[int]], kl: list[float | None], encoder: Encoder
) -> dict[str, pa.Array]:
    """Return a policy's columns of the table: the answers' texts, their tokens and their KL."""
    tokenizer, template = encoder.tokenizer, encoder.template
    texts = [prompts.decode_answer(tokenizer, ids, template=template) for ids in answers]
    return {
        f"{name}.answer": pa.array(texts, pa.string()),
        f"{name}.tokens": pa.array(answers, pa.list_(pa.int32())),
        f"{name}.kl": pa.array(kl, pa.float64()),
    }


def describe_answers(
    name: str, answers: list[list[int]], kl: list[float | None], end_ids: tuple[int, ...]
) -> dict[str, Any]:
    """Return metrics of a policy's answers: length, share with an end token and, of a trained policy, the
    KL from the SFT model.
    """
    metrics: dict[str, Any] = {
        f"{name}.length": sum(map(len, answers)) / len(answers),
        f"{name}.ended": sum(answer[-1] in end_ids for answer in answers) / len(answers),
    }
    known = [value for value in kl if value is not None]
    if name != "sft" and known:
        metrics[f"{name}.kl"] = intervals.mean_interval(known)._asdict()
    return metrics


if __name__ == "__main__":
    main(answer, AnswersJob)
