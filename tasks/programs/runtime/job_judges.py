"""Make the judges that a job names."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from tasks.config.commands.comparison import CompareJob
from tasks.config.jobs import WinrateJob
from tasks.config.judge_prompts import read_template
from tasks.config.sections.judges import JUDGE_KEY, JUDGE_URL, EndpointJudge, LocalJudge, NoJudge
from tasks.judges.chat_client import Address, Limits
from tasks.judges.endpoint_judge import EndpointJudge as EndpointModelJudge
from tasks.judges.endpoint_judge import Settings as EndpointSettings
from tasks.judges.gold_judge import gold_judge
from tasks.judges.judge import Battle, Judge
from tasks.judges.language_model_judge import LanguageModelJudge
from tasks.judges.language_model_judge import Settings as LabelSettings
from tasks.judges.reward_judge import RewardScores, held_out_judge, reward_judge
from tasks.judges.scoring_judge import ScoringJudge
from tasks.judges.text_judge import Settings as TextSettings
from tasks.judges.text_judge import TextJudge
from tasks.judges.verdict_cache import VerdictCache
from tasks.programs.runtime.policies import load_tuned
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.models import loading
from tasks.system.errors import InputError


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


def load_language_judge(settings: LocalJudge | EndpointJudge, run: Run, device: torch.device) -> Judge:
    """Return the language model that judges. Raises InputError."""
    if isinstance(settings, LocalJudge):
        return _load_local_judge(settings, run, device)
    return _open_endpoint_judge(settings, run)


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


def _load_local_judge(settings: LocalJudge, run: Run, device: torch.device) -> LanguageModelJudge | TextJudge:
    folder = run.inputs["judge"]
    template = read_template(run.inputs["prompt"])
    title = "the language model"  # its path is not in the key
    model, tokenizer = loading.load(folder, device=device), loading.load_tokenizer(folder)
    if settings.answer_by == "text":
        written = TextSettings(template, settings.max_tokens, settings.max_reply_tokens, settings.batch_size)
        return TextJudge(title, model, tokenizer, written)
    asked = LabelSettings(template, settings.max_tokens, settings.tie, settings.batch_size)
    return LanguageModelJudge(title, model, tokenizer, asked)


def _open_endpoint_judge(settings: EndpointJudge, run: Run) -> EndpointModelJudge:
    """Return the judge behind the endpoint that the environment names. Raises InputError."""
    missing = [name for name in (JUDGE_URL, JUDGE_KEY) if not os.environ.get(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be set where the judge's stage runs")
    home = Path(os.environ.get("ALIGNFLOW_HOME") or run.directory)
    return EndpointModelJudge(
        f"the language model {settings.model}",
        Address(os.environ[JUDGE_URL], os.environ[JUDGE_KEY]),
        VerdictCache(home / "verdicts.db"),
        EndpointSettings(
            template=read_template(run.inputs["prompt"]),
            model=settings.model,
            temperature=settings.temperature,
            max_reply_tokens=settings.max_reply_tokens,
            max_prompt_characters=settings.max_prompt_characters,
            concurrency=settings.concurrency,
            prompt_price=settings.prompt_price,
            reply_price=settings.reply_price,
            max_cost=settings.max_cost,
        ),
        Limits(settings.requests_per_minute, settings.timeout, settings.patience),
    )
