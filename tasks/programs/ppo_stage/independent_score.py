"""Score the policy now and then by something that it is not trained for, on prompts that it does not learn
from.

PPO raises its reward for as long as it trains; whether the answers get better is another question (Gao et al.
2022). The answers are drawn by numbers of their own, which depend on the prompt alone: no draw of the
training changes, and two measurements differ only because the weights do.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tasks.config.jobs import PpoJob
from tasks.config.sections.ppo import IndependentScore as Settings
from tasks.demo_site.gold import gold_score
from tasks.programs.ppo_stage.reward_mix import UNTOUCHED, RewardMix
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms.best_of_n import best_of_n, best_of_n_kl, powers_of_two
from tasks.rlhf.batches import prompts, sampling
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import distributed
from tasks.rlhf.evaluation.intervals import Interval, mean_interval
from tasks.rlhf.models import reward_model
from tasks.rlhf.training.rollouts import PpoModels, Rollout, ScoreRule, roll_out, score_answers
from tasks.system.errors import InputError

DRAWS = "independent score"
KEPT = 4  # measurements whose scores of each prompt are kept, to compare them with later ones

Score = Callable[[Rollout, list[str]], list[float]]  # of answers and their questions


class Measurement(NamedTuple):
    """Answers of the policy after ``step`` rollout batches: score, reward and KL of each prompt's."""

    step: int
    scores: list[float]
    rewards: list[float]  # as PPO maximises it
    kls: list[float]  # nats an answer

    @property
    def score(self) -> Interval:
        """Return the mean score with its interval."""
        return mean_interval(self.scores)

    @property
    def point(self) -> dict[str, float]:
        """Return the means, as they are logged."""
        score = self.score
        return {
            "independent_score": score.value,
            "independent_score_low": score.low,
            "independent_score_high": score.high,
            "score_reward": mean_interval(self.rewards).value,
            "score_kl": mean_interval(self.kls).value,
        }


class IndependentScore:
    """Measures the policy at some steps, and remembers what it found.

    ``points`` are the means of all measurements, ``recent`` the last few with every prompt's figures, and
    ``best_of`` those of best-of-n of the SFT model.
    """

    def __init__(
        self,
        settings: Settings,
        questions: list[tuple[int, str]],
        answer: Callable[[list[list[int]], list[str], Tensor], Rollout],
        score: Score,
        *,
        encoder: Encoder,
        seed: int,
        rows: int,
        state: dict[str, Any],
    ) -> None:
        self.settings, self.seed, self.rows = settings, seed, rows
        self.answer, self.score = answer, score
        self.ids = [id for id, _ in questions]
        self.texts = [text for _, text in questions]
        self.prompts = [encoder.encode_prompt(text) for text in self.texts]
        self.num_tokens = encoder.max_answer_tokens
        known = state.get("score", {})
        self.points: list[dict[str, float]] = known.get("points", [])
        self.recent = [Measurement(*one) for one in known.get("recent", [])]
        self.best_of: list[dict[str, float]] = known.get("best_of", [])

    def measure(self, step: int, *, is_last: bool = False) -> Measurement | None:
        """Return the measurement of the weights after ``step`` rollout batches, if one is due.

        The policy before the first step is the SFT model, so that best-of-n is measured then.
        """
        if step % self.settings.every and not is_last:
            return None
        if step == 0 and self.settings.best_of > 1:
            self._measure_best_of()
        found = Measurement(step, *self._answer(DRAWS))
        self.points.append({"step": step, **found.point})
        self.recent = [*self.recent, found][-KEPT:]
        return found

    def _measure_best_of(self) -> None:
        draws = [self._answer(f"{DRAWS}, best of n: {number}") for number in range(self.settings.best_of)]
        scores = torch.tensor([one[0] for one in draws]).T  # (P, N)
        rewards = torch.tensor([one[1] for one in draws]).T
        for n in powers_of_two(self.settings.best_of):
            mean = [best_of_n(rewards, what, n).mean().item() for what in (scores, rewards)]
            self.best_of.append(
                {"n": n, "kl": best_of_n_kl(n), "independent_score": mean[0], "reward": mean[1]}
            )

    def _answer(self, draws: str) -> tuple[list[float], list[float], list[float]]:
        """Return score, reward and KL of an answer to each prompt, drawn by the numbers called ``draws``."""
        uniform = sampling.uniform_numbers(self.seed, draws, self.ids, self.num_tokens)
        parts = [slice(first, first + self.rows) for first in range(0, len(self.ids), self.rows)]

        def figures(part: slice) -> list[list[float]]:
            rollout = self.answer(self.prompts[part], self.texts[part], uniform[part])
            kls = (rollout.logp - rollout.ref_logp).sum(dim=1).tolist()
            return [self.score(rollout, self.texts[part]), rollout.score.tolist(), kls]

        found = distributed.map_over_ranks(parts, figures)
        scores, rewards, kls = ([x for part in found for x in part[which]] for which in range(3))
        return scores, rewards, kls

    def forget(self) -> None:
        """Forget the recent measurements: later ones are of other weights."""
        self.recent = []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        return {"score": {"points": self.points, "recent": self.recent, "best_of": self.best_of}}


def build_score(
    job: PpoJob,
    run: Run,
    models: PpoModels,
    encoder: Encoder,
    mix: RewardMix,
    questions: list[tuple[int, str]],
    state: dict[str, Any],
) -> IndependentScore | None:
    """Return the independent score that the settings name, or None. ``questions`` are (id, text).

    Raises InputError if there is no such score for this data.
    """
    settings = job.ppo.score
    if settings.by is None:
        return None
    device = models.model.device
    # not the stage's encoder, which counts what training truncates
    own = pair_tables.build_encoder(job.text, encoder.tokenizer)
    end_ids = prompts.end_tokens(encoder.tokenizer, job.text.template)

    def answer(asked: list[list[int]], texts: list[str], uniform: Tensor) -> Rollout:
        rollout = roll_out(
            models._replace(value_head=None),
            asked,
            max_tokens=job.text.max_answer_tokens,
            temperature=job.ppo.temperature,
            end_ids=end_ids,
            pad_id=encoder.tokenizer.pad_token_id,
            score_rule=UNTOUCHED,
            device=device,
            uniform=uniform,
        )
        return mix.score(rollout, texts)

    score = (
        gold_scores(own, questions)
        if settings.by == "gold"
        else held_out_scores(run, models, mix.rule, device=device)
    )
    rows = run.machine.micro_batch or job.ppo.rollouts
    return IndependentScore(
        settings, questions, answer, score, encoder=own, seed=job.seed, rows=rows, state=state
    )


def held_out_scores(run: Run, models: PpoModels, rule: ScoreRule, *, device: torch.device) -> Score:
    """Return the function that scores by the member of the reward model that PPO never sees.

    Raises InputError if none was trained.
    """
    _, held_out = reward_model.load_held_out(run.inputs["reward"], models.model, device=device)
    if held_out is None:
        raise InputError(
            "ppo.score.by=held_out needs a reward model with a member that PPO never sees: train it with "
            "reward.held_out_member=true, or set ppo.score.by to null."
        )
    for parameter in models.trained.values():  # attaching an adapter freezes the others
        parameter.requires_grad_(True)
    scored = models._replace(reward=held_out)

    def score(rollout: Rollout, questions: list[str]) -> list[float]:
        del questions
        scores: list[float] = score_answers(scored, rule, rollout.batch, rollout.ended).tolist()
        return scores

    return score


def gold_scores(encoder: Encoder, questions: Sequence[tuple[int, str]]) -> Score:
    """Return the function that scores by the gold scorer.

    Raises InputError if the questions are not of its site.
    """
    try:
        gold_score(questions[0][1], "")
    except ValueError as error:
        raise InputError(
            f"ppo.score.by=gold scores answers to the built-in site's questions only ({error}): set it to "
            "held_out or null."
        ) from None

    def score(rollout: Rollout, asked: list[str]) -> list[float]:
        ids, mask = rollout.batch
        answers = [
            prompts.decode_answer(encoder.tokenizer, row[kept].tolist(), template=encoder.template)
            for row, kept in zip(ids, mask, strict=True)
        ]
        return [gold_score(one, text) for one, text in zip(asked, answers, strict=True)]

    return score
