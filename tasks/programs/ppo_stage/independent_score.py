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
from tasks.config.sections.judges import NoJudge
from tasks.config.sections.ppo import IndependentScore as Settings
from tasks.demo_site.gold import gold_score
from tasks.judges.preference import Preference
from tasks.programs.ppo_stage.reward_mix import UNTOUCHED, RewardMix
from tasks.programs.ppo_stage.text_guard import decode_answers
from tasks.programs.runtime import language_judges, pair_tables
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

Describe = Callable[[Rollout, list[str]], list[Any]]  # of answers and their questions


class Score(NamedTuple):
    """How answers are scored: ``decide`` makes scores of what ``describe`` has returned of all answers.

    Each rank describes the answers that it samples. ``preference`` is the judge that decides, if one does.
    """

    describe: Describe
    decide: Callable[[list[Any]], list[float]] = list
    preference: Preference | None = None


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
        num_steps: int,
        seed: int,
        rows: int,
        state: dict[str, Any],
    ) -> None:
        self.settings, self.num_steps, self.seed, self.rows = settings, num_steps, seed, rows
        self.answer, self.score = answer, score
        self.ids = [id for id, _ in questions]
        self.texts = [text for _, text in questions]
        self.prompts = [encoder.encode_prompt(text) for text in self.texts]
        self.num_tokens = encoder.max_answer_tokens
        known = state.get("score", {})
        self.points: list[dict[str, float]] = known.get("points", [])
        self.recent = [Measurement(*one) for one in known.get("recent", [])]
        self.best_of: list[dict[str, float]] = known.get("best_of", [])
        self.has_started = bool(known)

    def start(self) -> None:
        """Measure the SFT model, which the policy is before other weights are loaded."""
        described, _, _ = self._answer(DRAWS)
        self._start(described)

    def measure(self, step: int, *, is_last: bool = False) -> Measurement | None:
        """Return the measurement of the weights after ``step`` rollout batches, if one is due.

        Unless ``start`` was called, the policy before the first step is the SFT model, so that best-of-n is
        measured then.
        """
        if step % self.settings.every and not is_last:
            return None
        described, *others = self._answer(DRAWS)
        if not self.has_started:
            self._start(described)
        found = Measurement(step, self.score.decide(described), *others)
        self.points.append({"step": step, **found.point})
        self.recent = [*self.recent, found][-KEPT:]
        return found

    def _start(self, described: list[Any]) -> None:
        """Measure best-of-n of the SFT model, whose answers are those that a judge compares others with."""
        self.has_started = True
        if self.score.preference:
            steps, every, has_best = self.num_steps, self.settings.every, self.settings.best_of > 1
            self.score.preference.start(described, num_comparisons=-(-steps // every) + has_best)
        if self.settings.best_of > 1:
            self._measure_best_of()

    def _measure_best_of(self) -> None:
        sizes = powers_of_two(self.settings.best_of)
        draws = [self._answer(f"{DRAWS}, best of n: {number}") for number in range(self.settings.best_of)]
        rewards = torch.tensor([one[1] for one in draws]).T  # (P, N)
        if self.score.preference:  # verdicts on all answers would cost too much
            best = rewards[:, : sizes[-1]].argmax(dim=1).tolist()
            chosen = [draws[number][0][place] for place, number in enumerate(best)]
            means = {1: 0.5, sizes[-1]: mean_interval(self.score.decide(chosen)).value}
        else:
            scores = torch.tensor([self.score.decide(one[0]) for one in draws]).T
            means = {n: best_of_n(rewards, scores, n).mean().item() for n in sizes}
        for n in sizes:
            found = {"n": n, "kl": best_of_n_kl(n), "reward": best_of_n(rewards, rewards, n).mean().item()}
            self.best_of.append(found | ({"independent_score": means[n]} if n in means else {}))

    def _answer(self, draws: str) -> tuple[list[Any], list[float], list[float]]:
        """Return description, reward and KL of an answer to each prompt, drawn by the numbers called
        ``draws``.
        """
        uniform = sampling.uniform_numbers(self.seed, draws, self.ids, self.num_tokens)
        parts = [slice(first, first + self.rows) for first in range(0, len(self.ids), self.rows)]

        def figures(part: slice) -> list[list[Any]]:
            rollout = self.answer(self.prompts[part], self.texts[part], uniform[part])
            kls = (rollout.logp - rollout.ref_logp).sum(dim=1).tolist()
            return [self.score.describe(rollout, self.texts[part]), rollout.score.tolist(), kls]

        found = distributed.map_over_ranks(parts, figures)
        described, rewards, kls = ([x for part in found for x in part[which]] for which in range(3))
        return described, rewards, kls

    def forget(self) -> None:
        """Forget the recent measurements: later ones are of other weights."""
        self.recent = []

    def warnings(self) -> list[str]:
        """Return sentences on what a judge could not decide."""
        return self.score.preference.warnings() if self.score.preference else []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        found = {"points": self.points, "recent": self.recent, "best_of": self.best_of}
        judge = {"judge": self.score.preference.state()} if self.score.preference else {}
        return {"score": found | judge}


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
    own = pair_tables.build_encoder(job.text, encoder.tokenizer, encoder.chats)
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
        return mix.score(rollout, texts, own.chats)

    if settings.by == "gold":
        score = Score(gold_scores(own, questions))
    elif settings.by == "judge":
        score = judge_score(job, run, own, questions, state, device=device)
    else:
        score = Score(held_out_scores(run, models, mix.rule, device=device))
    return IndependentScore(
        settings,
        questions,
        answer,
        score,
        encoder=own,
        num_steps=job.ppo.steps,
        seed=job.seed,
        rows=run.machine.micro_batch or job.ppo.rollouts,
        state=state,
    )


def held_out_scores(run: Run, models: PpoModels, rule: ScoreRule, *, device: torch.device) -> Describe:
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


def gold_scores(encoder: Encoder, questions: Sequence[tuple[int, str]]) -> Describe:
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
        answers = decode_answers(rollout, encoder)
        return [gold_score(one, text) for one, text in zip(asked, answers, strict=True)]

    return score


def judge_score(
    job: PpoJob,
    run: Run,
    encoder: Encoder,
    questions: Sequence[tuple[int, str]],
    state: dict[str, Any],
    *,
    device: torch.device,
) -> Score:
    """Return the score by a language model, which the first rank asks.

    Raises InputError if it cannot be asked.
    """
    if isinstance(job.judge, NoJudge):
        raise InputError("ppo.score.by=judge needs the settings judge: `alignflow job` writes them.")
    preference = Preference(
        language_judges.judge_opener(job.judge, run, device),
        [text for _, text in questions],
        phase=run.phase,
        state=state.get("score", {}).get("judge", {}),
    )
    distributed.from_first(preference.try_judge)
    return Score(
        lambda rollout, _: decode_answers(rollout, encoder),
        lambda answers: distributed.from_first(lambda: preference(answers)),
        preference,
    )
