"""Make the judges that a job names."""

from pathlib import Path

import torch

from tasks.config.jobs import WinrateJob
from tasks.config.judge_prompts import read_template
from tasks.config.judges import LocalJudge, NoJudge
from tasks.judges.gold_judge import gold_judge
from tasks.judges.judge import Judge
from tasks.judges.language_model_judge import LanguageModelJudge
from tasks.judges.language_model_judge import Settings as LabelSettings
from tasks.judges.reward_judge import RewardScores, reward_judge
from tasks.programs.runtime.policies import load_tuned
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.models import loading


def load_judges(job: WinrateJob, run: Run, encoder: Encoder, device: torch.device) -> list[Judge]:
    """Return the judges, the most trustworthy first: a run is judged by that one.

    Raises InputError.
    """
    judges: list[Judge] = []
    if job.source.kind == "shell-site":
        judges.append(gold_judge())
    if isinstance(job.judge, LocalJudge):
        judges.append(_load_label_judge(job.judge, run, device))
    judges.append(reward_judge(_load_reward_scores(job, run, encoder, device)))
    return judges


def limits(judge: Judge, job: WinrateJob) -> tuple[int, int]:
    """Return the largest numbers of questions and of graded pairs that a judge decides."""
    settings = job.judge if isinstance(judge, LanguageModelJudge) else job.winrate
    assert not isinstance(settings, NoJudge)
    return settings.num_questions, settings.num_graded_pairs


def _load_label_judge(settings: LocalJudge, run: Run, device: torch.device) -> LanguageModelJudge:
    folder = run.inputs["judge"]
    template = read_template(run.inputs["prompt"])
    asked = LabelSettings(template, settings.max_tokens, settings.tie, settings.batch_size)
    title = f"the language model {Path(settings.path).name}"
    return LanguageModelJudge(
        title, loading.load(folder, device=device), loading.load_tokenizer(folder), asked
    )


def _load_reward_scores(job: WinrateJob, run: Run, encoder: Encoder, device: torch.device) -> RewardScores:
    """Load the reward model: adapters on the merged SFT model, or a model of its own."""
    scorer = load_tuned(run, job.weights.merged, device).scorer
    assert scorer is not None
    pad_id = encoder.tokenizer.pad_token_id
    return RewardScores(scorer, encoder, pad_id, device, job.winrate.batch_size)
