"""Make the judges that a job names."""

from collections.abc import Sequence
from functools import partial

import torch

from tasks.config.commands.comparison import CompareJob
from tasks.config.jobs import WinrateJob
from tasks.config.sections.judges import NoJudge
from tasks.judges.endpoint_judge import EndpointJudge as EndpointModelJudge
from tasks.judges.gold_judge import gold_judge
from tasks.judges.judge import Battle, Judge
from tasks.judges.reward_judge import RewardScores, held_out_judge, reward_judge
from tasks.judges.scoring_judge import ScoringJudge
from tasks.programs.runtime.language_judges import load_language_judge
from tasks.programs.runtime.policies import load_tuned
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.truncation import Encoder


def load_judges(job: WinrateJob, run: Run, encoder: Encoder, device: torch.device) -> list[Judge]:
    """Return the judges, the most trustworthy first: a run is judged by that one.

    Raises InputError.
    """
    judges: list[Judge] = []
    if job.source.kind == "shell-site":
        judges.append(gold_judge())
    if not isinstance(job.judge, NoJudge):
        judges.append(load_language_judge(job.judge, run, device))
    return [*judges, *load_reward_judges(job, run, encoder, device)]


def load_reward_judges(
    job: WinrateJob | CompareJob, run: Run, encoder: Encoder, device: torch.device
) -> list[ScoringJudge]:
    """Return the reward model as a judge, after the member that PPO has never seen, if one was trained."""
    models = load_tuned(run, job.weights.merged, device, with_held_out=True)
    assert models.scorer is not None
    score = partial(
        RewardScores,
        encoder=encoder,
        pad_id=encoder.tokenizer.pad_token_id,
        device=device,
        batch_size=job.winrate.batch_size,
    )
    held_out = [held_out_judge(score(models.held_out))] if models.held_out else []
    return [*held_out, reward_judge(score(models.scorer))]


def limits(judge: Judge, job: WinrateJob) -> tuple[int, int]:
    """Return the largest numbers of questions and of graded pairs that a judge decides."""
    settings = job.winrate if isinstance(judge, ScoringJudge) else job.judge
    assert not isinstance(settings, NoJudge)
    return settings.num_questions, settings.num_graded_pairs


def refuse_unaffordable(judge: Judge, battles: Sequence[Battle]) -> None:
    """Refuse verdicts that would cost more than the settings allow, before any is paid. Raises InputError."""
    if isinstance(judge, EndpointModelJudge):
        judge.refuse_unaffordable(battles)
