"""Let the last policies answer prompts of the rl split, and score the answers with the last reward model.

python -m tasks.programs.rounds.candidates DIR

inputs: data; model (the merged SFT model: it answers with sample.sft, or without policies, as at first with
        rounds.start=sft); policy, policy2, ... (the last policies, the newest first); reward, if there is one
artifact: candidates.parquet (one row an answer), summary.json

An answer depends on its policy, the number of its draw and its prompt alone, but for the last digits.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import CandidatesJob
from tasks.dataset import row_sample
from tasks.programs.rounds.hashed_number import hashed_number
from tasks.programs.rounds.round_tables import CANDIDATE, write_rows
from tasks.programs.runtime import pair_tables, table_rows
from tasks.programs.runtime.policies import Models, load_tuned
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.batches import prompts, sampling
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices
from tasks.rlhf.evaluation.answer_scores import score_answers
from tasks.rlhf.models import loading, reward_model
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite
from tasks.system.errors import InputError

Row = dict[str, Any]


def sample_candidates(job: CandidatesJob, run: Run) -> None:
    """Sample answers of each policy to each prompt, and score them."""
    # 1. Prompts, without those of PPO's independent score. A killed program starts over.
    run.rewind(0)
    device = devices.set_up(run.machine.device, run.machine.threads)
    questions = read_prompts(job, run)
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer, table_rows.chats_of(questions))

    # 2. Answers.
    models = load_tuned(run, job.weights.merged, device)
    names = sorted(name for name in run.inputs if re.fullmatch(r"policy\d*", name))
    if job.sample.sft or not names:
        names.append("sft")
    sampler = Sampler(job, encoder, questions)
    rows = sampler.sample_all(names, models, run)

    # 3. Rewards of each member, raw, and as PPO sees them.
    if models.scorer:
        ids = [row["question_id"] for row in questions]
        prompt_of = dict(zip(ids, sampler.prompts, strict=True))
        answers = [(prompt_of[row["question_id"]], row["tokens"]) for row in rows]
        batch_size, pad_id = job.sample.batch_size, tokenizer.pad_token_id
        raw = member_rewards(models.scorer, answers, batch_size, pad_id, device, run)
        add_rewards(rows, models.scorer, raw)

    # 4. The artifact.
    rows.sort(key=lambda row: (row["question_id"], row["policy"], row["draw"]))
    write_rows(run.artifact / "candidates.parquet", rows, CANDIDATE)
    run.warnings += encoder.warnings()
    run.finish(describe(rows) | encoder.metrics("candidates"), policies=names, questions=len(questions))


def read_prompts(job: CandidatesJob, run: Run) -> list[Row]:
    """Return the prompts that are answered, in the order of the table.

    Those of ``ppo.score`` are left out: a reward model that had learnt from answers to them would spoil the
    score. Of the others ``sample.prompts`` are drawn by the seed. Raises InputError if there are none.
    """
    table = run.inputs["data"] / "rl.parquet"
    ids = pq.read_table(table, columns=["question_id"])["question_id"].to_pylist()
    held_out = set(row_sample.draw_sample(ids, job.held_out_prompts))
    places = [place for place in range(len(ids)) if place not in held_out]
    if not places:
        raise InputError("The rl split has no prompts to ask about: raise data.rl_share or give more data.")
    if job.sample.prompts is not None:
        places.sort(key=lambda place: hashed_number("prompt", job.seed, ids[place]))
        places = sorted(places[: job.sample.prompts])
    return table_rows.read_rows(table, places, ["question_id", "prompt", "messages"])


class Sampler:
    """Samples the answers of policies to prompts, in batches."""

    def __init__(self, job: CandidatesJob, encoder: Encoder, questions: Sequence[Row]) -> None:
        self.seed, self.settings, self.encoder = job.seed, job.sample, encoder
        self.questions = questions
        self.prompts = [encoder.encode_prompt(row["prompt"]) for row in questions]
        self.end_ids = prompts.end_tokens(encoder.tokenizer, encoder.template)

    def sample_all(self, names: Sequence[str], models: Models, run: Run) -> list[Row]:
        """Return the rows of all policies' answers, without rewards. Logs a step per batch."""
        size = self.settings.batch_size
        firsts = range(0, len(self.questions), size)
        total = len(names) * self.settings.answers * len(firsts)
        rows: list[Row] = []
        for number, (name, draw) in enumerate(product(names, range(self.settings.answers))):
            uniform = self._draw_numbers(name, draw)
            for place, first in enumerate(firsts, 1):
                batch = slice(first, first + size)
                answers = self._sample(name, models, self.prompts[batch], uniform[batch])
                for question, tokens in zip(self.questions[batch], answers, strict=True):
                    rows.append(self._describe(question, name, draw, tokens))
                run.log(number * len(firsts) + place, total)
        return rows

    def _draw_numbers(self, name: str, draw: int) -> Tensor:
        ids = [row["question_id"] for row in self.questions]
        return sampling.uniform_numbers(self.seed, f"{name} {draw}", ids, self.encoder.max_answer_tokens)

    @torch.no_grad()
    def _sample(self, name: str, models: Models, batch: list[list[int]], uniform: Tensor) -> list[list[int]]:
        """Return the token ids of one answer to each prompt of a batch."""
        with models.active[name]() as policy:
            samples = sampling.sample(
                policy,
                batch,
                max_tokens=self.encoder.max_answer_tokens,
                temperature=self.settings.temperature,
                end_ids=self.end_ids,
                pad_id=self.encoder.tokenizer.pad_token_id,
                uniform=uniform,
            )
        check_finite({f"{name}'s log-probability of its own answer": samples.logp}, advice=UNSOUND_MODEL)
        return [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]

    def _describe(self, question: Row, name: str, draw: int, tokens: list[int]) -> Row:
        template = self.encoder.template
        return {
            "question_id": question["question_id"],
            "prompt": question["prompt"],
            "messages": question.get("messages"),
            "policy": name,
            "draw": draw,
            "answer": prompts.decode_answer(self.encoder.tokenizer, tokens, template=template),
            "tokens": tokens,
            "ended": tokens[-1] in self.end_ids,
            "rewards": [],
            "reward": None,
        }


def add_rewards(rows: list[Row], scorer: Scorer, raw: Tensor) -> None:
    """Add the members' raw rewards (M, N) to N rows, and the combined one. Raises InputError if one is not
    finite.
    """
    check_finite({"the reward of a sampled answer": raw}, advice=UNSOUND_MODEL)
    for row, rewards, reward in zip(rows, raw.T.tolist(), combine_raw(scorer, raw).tolist(), strict=True):
        row["rewards"], row["reward"] = rewards, reward


def member_rewards(
    scorer: Scorer,
    answers: list[tuple[list[int], list[int]]],
    batch_size: int,
    pad_id: int,
    device: torch.device,
    run: Run,
) -> Tensor:
    """Return the raw reward of each answer by each member, (M, N) float32: differences are log odds."""
    found = []
    for number, member in enumerate(scorer.members, 1):
        alone = Scorer((member._replace(mean=0.0, std=1.0),), 0.0)
        found.append(
            score_answers(
                partial(reward_model.rewards, alone),
                answers,
                pad_id=pad_id,
                device=device,
                batch_size=batch_size,
                report_progress=run.phase(f"scoring by member {number}"),
            )
        )
    return torch.stack(found)


def combine_raw(scorer: Scorer, raw: Tensor) -> Tensor:
    """Return the reward as PPO sees it of the members' raw ones, (M, N) -> (N,)."""
    mean = torch.tensor([member.mean for member in scorer.members])[:, None]
    std = torch.tensor([member.std for member in scorer.members])[:, None]
    combined = reward_model.combine_members((raw - mean) / std, scorer.uncertainty_penalty)
    return (combined - scorer.mean) / scorer.std


def describe(rows: Sequence[Row]) -> dict[str, float]:
    """Return metrics of the answers."""
    count = len(rows)
    metrics: dict[str, float] = {
        "candidates.answers": count,
        "candidates.prompts": len({row["question_id"] for row in rows}),
        "candidates.tokens": sum(len(row["tokens"]) for row in rows) / count,
        "candidates.ended": sum(row["ended"] for row in rows) / count,
    }
    rewards = [row["reward"] for row in rows if row["reward"] is not None]
    if rewards:
        metrics["candidates.reward"] = sum(rewards) / len(rewards)
    return metrics


if __name__ == "__main__":
    main(sample_candidates, CandidatesJob)
