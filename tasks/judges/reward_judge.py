"""Judge answers by a reward model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.judges.judge import ReportProgress
from tasks.judges.scoring_judge import Asked, ScoringJudge
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.evaluation.answer_scores import score_answers
from tasks.rlhf.models import reward_model
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite


class RewardScores(NamedTuple):
    """Scores answers with a reward model, normalised as in PPO."""

    scorer: Scorer
    encoder: Encoder
    pad_id: int
    device: torch.device
    batch_size: int

    def __call__(self, asked: Sequence[Asked], report_progress: ReportProgress) -> list[float]:
        """Return the normalised reward of each answer. Raises InputError if one is not finite.

        A sampled answer is scored by its own tokens, a written one by the encoder's.
        """
        pairs = [
            (
                self.encoder.encode_prompt(question),
                self.encoder.encode_answer(answer.text) if answer.ids is None else answer.ids,
            )
            for question, answer in asked
        ]
        scores = score_answers(
            self._score,
            pairs,
            pad_id=self.pad_id,
            device=self.device,
            batch_size=self.batch_size,
            report_progress=report_progress,
        )
        return scores.tolist()

    def _score(self, batch: Sequences) -> Tensor:
        scores = reward_model.normalised_rewards(self.scorer, batch)
        check_finite({"the reward model's score": scores}, advice=UNSOUND_MODEL)
        return scores


def reward_judge(scores: RewardScores) -> ScoringJudge:
    """Return the reward model that PPO was trained with as a judge."""
    return ScoringJudge(
        "reward",
        "the reward model",
        "PPO was trained to please this very judge, so its wins here are an upper bound and no proof.",
        score=scores,
    )


def held_out_judge(scores: RewardScores) -> ScoringJudge:
    """Return the member of the reward model that PPO has never seen as a judge."""
    return ScoringJudge(
        "held_out",
        "the held-out reward model",
        "It has learnt from the same votes as the reward model, and PPO has never seen it: it shares that "
        "model's base and its blind spots, and not its accidents.",
        score=scores,
    )
