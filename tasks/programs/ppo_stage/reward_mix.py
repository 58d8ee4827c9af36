"""Score answers with the run's reward model, with other ones, and with functions of the user's.

Each reward model is normalised by its own mean and deviation over reference answers. A model in Hugging Face
format has none stored: its own are measured once, and are a part of the checkpoints. So are the scores of a
few reference answers, by which a resumed run sees that each part still computes the same.
"""

from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import PpoJob
from tasks.config.sections.rewards import OWN
from tasks.dataset import row_sample
from tasks.programs.ppo_stage.other_reward_models import (
    AnsweredQuestions,
    Chats,
    SharedScorer,
    TextScorer,
    load_other_model,
)
from tasks.programs.ppo_stage.reward_functions import LoadedFunction, load_function
from tasks.programs.runtime import table_rows
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import running_moments, sanity_checks
from tasks.rlhf.algorithms.running_moments import Moments
from tasks.rlhf.batches import prompts, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import distributed
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite
from tasks.rlhf.training.rollouts import PpoModels, Rollout, ScoreRule, score_answers

REFERENCE_ANSWERS = 256  # whose rewards set the normalisation of a model that has none
PROBES = 8  # of them, whose scores a resumed run compares
PROBE_TOLERANCE = 1e-2  # of a normalised reward or a function's number
UNTOUCHED = ScoreRule("add", 0.0)  # returns normalised rewards as they are


class Part(NamedTuple):
    """A reward beside the run's own, with its weight."""

    name: str
    weight: float
    score: SharedScorer | TextScorer | LoadedFunction


class RewardMix:
    """The score of answers: a weighted sum, its running normalisation, and what a missing end gets."""

    def __init__(
        self, job: PpoJob, parts: list[Part], models: PpoModels, encoder: Encoder, state: dict[str, Any]
    ) -> None:
        self.settings, self.parts, self.models, self.encoder = job.ppo.rewards, parts, models, encoder
        ppo = job.ppo
        self.rule = ScoreRule(ppo.missing_eos, ppo.missing_eos_reward, max_score=ppo.max_score)
        self.moments = Moments(*state.get("reward_moments", ()))
        self.probes: dict[str, list[float]] = state.get("reward_probes", {})
        self.measured: dict[str, tuple[float, float]] = state.get("reward_measured", {})
        self.means: dict[str, float] = {}  # of the last batch, by part

    def rescore(self, rollout: Rollout, questions: list[str], chats: Chats) -> Rollout:
        """Return a rollout with its score; it comes with the normalised rewards of the run's own model.

        ``questions`` are the texts of its prompts, ``chats`` the messages of those that are conversations.
        Updates the running moments. Raises InputError.
        """
        rewards = self._rewards(rollout.score, rollout.batch, rollout.ended, questions, chats)
        self._measure(rewards)
        total = self._sum(rewards)
        if self.settings.running_normalisation:
            counted = total if self.rule.missing_eos == "add" else total[rollout.ended]
            for moments in distributed.all_gather(running_moments.moments_of(counted)):
                self.moments = running_moments.combine(self.moments, moments)
        return rollout._replace(score=self._finish(total, rollout.ended))

    def score(self, rollout: Rollout, questions: list[str], chats: Chats) -> Rollout:
        """Return a rollout with its score as training would have it now; nothing is updated."""
        rewards = self._rewards(rollout.score, rollout.batch, rollout.ended, questions, chats)
        return rollout._replace(score=self._finish(self._sum(rewards), rollout.ended))

    def __call__(self, batch: Sequences, ended: Tensor, questions: list[str], chats: Chats) -> Tensor:
        """Return the score of each answer (B,), as training would have it now."""
        own = score_answers(self.models, UNTOUCHED, batch, ended)
        return self._finish(self._sum(self._rewards(own, batch, ended, questions, chats)), ended)

    def metrics(self) -> dict[str, float]:
        """Return the mean reward of each part over the last batch, if there are several."""
        return {f"reward_{name}": mean for name, mean in self.means.items()}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        found: dict[str, Any] = {}
        if self.settings.running_normalisation:
            found["reward_moments"] = self.moments
        if self.parts:
            found |= {"reward_probes": self.probes, "reward_measured": self.measured}
        return found

    def frozen(self) -> list[Tensor]:
        """Return the heads of the other models, which nothing may change."""
        scorers = [part.score.scorer for part in self.parts if not isinstance(part.score, LoadedFunction)]
        return [one for scorer in scorers for member in scorer.members for one in member.head.parameters()]

    def warnings(self) -> list[str]:
        """Return sentences on texts that were cut for a model, naming it."""
        found = []
        for part in self.parts:
            if isinstance(part.score, TextScorer):
                cut = part.score.encoder.warnings()
                found += [f"ppo.rewards.models {part.name}: {sentence}" for sentence in cut]
        return found

    def _rewards(
        self, own: Tensor, batch: Sequences, ended: Tensor, questions: list[str], chats: Chats
    ) -> dict[str, Tensor]:
        """Return the reward of each answer by each part, (B,) each."""
        rewards = {OWN: own}
        if not self.parts:
            return rewards
        answers = [ids[mask].tolist() for ids, mask in zip(*batch, strict=True)]
        tokenizer, template = self.encoder.tokenizer, self.encoder.template
        texts = [prompts.decode_answer(tokenizer, ids, template=template) for ids in answers]
        answered = AnsweredQuestions(questions, texts, ended.tolist(), chats)
        for part in self.parts:
            rewards[part.name] = score_part(part, batch, answered).to(own)
        return rewards

    def _sum(self, rewards: dict[str, Tensor]) -> Tensor:
        total = self.settings.model_weight * rewards[OWN]
        for part in self.parts:
            total = total + part.weight * rewards[part.name]
        return total

    def _finish(self, total: Tensor, ended: Tensor) -> Tensor:
        if self.settings.running_normalisation:
            total = running_moments.normalise(total, self.moments)
        return self.rule(total, ended)

    def _measure(self, rewards: dict[str, Tensor]) -> None:
        if not self.parts:
            return
        sums = distributed.all_reduce(
            [float(len(rewards[OWN])), *(one.sum().item() for one in rewards.values())]
        )
        self.means = {name: total / sums[0] for name, total in zip(rewards, sums[1:], strict=True)}


def score_part(part: Part, batch: Sequences, answered: AnsweredQuestions) -> Tensor:
    """Return a part's reward of each answer, (B,). Raises InputError if one is not finite."""
    if isinstance(part.score, LoadedFunction):
        return torch.tensor(part.score(answered.questions, answered.answers))
    rewards = part.score(batch) if isinstance(part.score, SharedScorer) else part.score(answered)
    check_finite({f"the reward of ppo.rewards.models {part.name}": rewards}, advice=UNSOUND_MODEL)
    return rewards


def load_reward_mix(
    job: PpoJob, run: Run, encoder: Encoder, models: PpoModels, state: dict[str, Any], device: torch.device
) -> RewardMix:
    """Return the mix that the settings ask for, each part checked; ``state`` is a checkpoint's, or empty.

    Raises InputError and StepZeroError.
    """
    settings = job.ppo.rewards
    mix = RewardMix(job, [], models, encoder, state)
    if not settings.parts:
        return mix
    reference = read_reference(run, encoder, device)
    for model in settings.models:
        score, is_normalised = load_other_model(model, job, run, models, device)
        if not is_normalised:
            assert isinstance(score, TextScorer)
            if model.name not in mix.measured:
                mix.measured[model.name] = _measure_normalisation(score, reference.answered)
            mean, std = mix.measured[model.name]
            score = score._replace(scorer=score.scorer._replace(mean=mean, std=std))
        mix.parts.append(Part(model.name, model.weight, score))
    for function in settings.functions:
        loaded = load_function(function, job.reward_code.get(function.name))
        mix.parts.append(Part(function.name, function.weight, loaded))
    for part in mix.parts:
        _check_part(part, mix, run, reference.first(PROBES))
    return mix


class Reference(NamedTuple):
    """Best answers of the fine-tuning split, as tokens and as text."""

    batch: Sequences
    answered: AnsweredQuestions

    def first(self, count: int) -> "Reference":
        """Return the first of them."""
        rows = torch.arange(min(count, len(self.answered.ended)), device=self.batch.input_ids.device)
        return Reference(self.batch.rows(rows), self.answered.rows(slice(count)))


def read_reference(run: Run, encoder: Encoder, device: torch.device) -> Reference:
    """Return reference answers, drawn by the ids of their questions; the policy's limits cut none of them."""
    table, columns = run.inputs["data"] / "finetune.parquet", ["prompt", "answer", "messages"]
    ids = pq.read_table(table, columns=["question_id"])["question_id"].to_pylist()
    rows = table_rows.read_rows(table, row_sample.draw_sample(ids, REFERENCE_ANSWERS), columns)
    chats = table_rows.chats_of(rows)
    uncounted = Encoder(
        encoder.tokenizer,
        template=encoder.template,
        max_prompt_tokens=encoder.max_prompt_tokens,
        max_answer_tokens=encoder.max_answer_tokens,
        chats=chats,
    )
    asked = [uncounted.encode_prompt(row["prompt"]) for row in rows]
    replies = [uncounted.encode_answer(row["answer"]) for row in rows]
    batch = sequences.join(asked, replies, pad_id=encoder.tokenizer.pad_token_id, device=device)
    answered = AnsweredQuestions(
        [row["prompt"] for row in rows], [row["answer"] for row in rows], [True] * len(rows), chats
    )
    return Reference(batch, answered)


def _measure_normalisation(score: TextScorer, answered: AnsweredQuestions) -> tuple[float, float]:
    """Return mean and deviation of a model's rewards of reference answers."""
    rewards = score(answered)
    check_finite({"the reward of reference answers": rewards}, advice=UNSOUND_MODEL)
    return rewards.mean().item(), max(rewards.std().item(), 1e-6) if len(rewards) > 1 else 1.0


def _check_part(part: Part, mix: RewardMix, run: Run, probes: Reference) -> None:
    """Check that a part scores reference answers alone as together, twice alike, and as before a resume.

    Raises InputError and StepZeroError.
    """
    scores = score_part(part, probes.batch, probes.answered)
    if isinstance(part.score, LoadedFunction):
        if not scores.equal(score_part(part, probes.batch, probes.answered)):
            run.warn(
                f"{part.score.setting} returned other numbers for the same answers when it was called again: "
                "this run cannot be repeated, nor resumed exactly."
            )
            return
    else:
        alone = torch.cat([_score_alone(part, probes, row) for row in range(len(scores))])
        sanity_checks.check_close(
            f"The rewards of ppo.rewards.models {part.name} for answers alone and in a batch",
            alone,
            scores,
            tolerance=max(PROBE_TOLERANCE, 0.05 * scores.abs().max().item()),
            cause="padding is visible to the model.",
        )
    before = mix.probes.setdefault(part.name, scores.tolist())
    sanity_checks.check_close(
        f"The rewards of {part.name} for reference answers now and when the run was started",
        scores,
        torch.tensor(before).to(scores),
        tolerance=PROBE_TOLERANCE,
        cause="its files, its precision or what it reads has changed; start the stage again.",
    )


def _score_alone(part: Part, probes: Reference, row: int) -> Tensor:
    one = torch.tensor([row], device=probes.batch.input_ids.device)
    return score_part(part, probes.batch.rows(one), probes.answered.rows(slice(row, row + 1)))
