"""Make the language model that judges, from the settings."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from tasks.config.judge_prompts import read_template
from tasks.config.sections.judges import JUDGE_KEY, JUDGE_URL, EndpointJudge, LocalJudge
from tasks.judges.chat_client import Address, Limits
from tasks.judges.endpoint_judge import EndpointJudge as EndpointModelJudge
from tasks.judges.endpoint_judge import Settings as EndpointSettings
from tasks.judges.judge import Judge
from tasks.judges.language_model_judge import LanguageModelJudge
from tasks.judges.language_model_judge import Settings as LabelSettings
from tasks.judges.preference import OpenJudge
from tasks.judges.text_judge import Settings as TextSettings
from tasks.judges.text_judge import TextJudge
from tasks.judges.verdict_cache import VerdictCache
from tasks.programs.runtime.program import Run
from tasks.rlhf.models import loading
from tasks.system.errors import InputError


def load_language_judge(settings: LocalJudge | EndpointJudge, run: Run, device: torch.device) -> Judge:
    """Return the language model that judges. Raises InputError."""
    return judge_opener(settings, run, device)(0.0)


def judge_opener(settings: LocalJudge | EndpointJudge, run: Run, device: torch.device) -> OpenJudge:
    """Return a function that makes the judge, as often as it is called, each time without counts.

    The model, or the file of replies, is opened by its first call. Raises InputError.
    """
    template = read_template(run.inputs["prompt"])
    if isinstance(settings, EndpointJudge):
        home = Path(os.environ.get("ALIGNFLOW_HOME") or run.directory)
        replies = cache(lambda: VerdictCache(home / "verdicts.db"))
        return lambda spent: _open_endpoint_judge(settings, template, replies, spent)
    folder = run.inputs["judge"]
    model = cache(lambda: loading.load(folder, device=device))
    tokenizer = cache(lambda: loading.load_tokenizer(folder))
    title = "the language model"  # its path is not in the key
    if settings.answer_by == "text":
        written = TextSettings(template, settings.max_tokens, settings.max_reply_tokens, settings.batch_size)
        return lambda _: TextJudge(title, model(), tokenizer(), written)
    asked = LabelSettings(template, settings.max_tokens, settings.tie, settings.batch_size)
    return lambda _: LanguageModelJudge(title, model(), tokenizer(), asked)


def _open_endpoint_judge(
    settings: EndpointJudge, template: str, open_replies: Callable[[], VerdictCache], spent: float
) -> EndpointModelJudge:
    """Return the judge behind the endpoint that the environment names. Raises InputError."""
    missing = [name for name in (JUDGE_URL, JUDGE_KEY) if not os.environ.get(name)]
    if missing:
        raise InputError(f"{' and '.join(missing)} must be set where the judge's stage runs")
    return EndpointModelJudge(
        f"the language model {settings.model}",
        Address(os.environ[JUDGE_URL], os.environ[JUDGE_KEY]),
        open_replies(),
        EndpointSettings(
            template=template,
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
        spent=spent,
    )
