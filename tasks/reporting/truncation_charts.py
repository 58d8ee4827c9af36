"""Build the table of texts that were truncated to the models' limits, by stage."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.reporting.numbers import format_percent
from tasks.rlhf.thresholds import MUCH_TRUNCATED

STAGES = {
    "sft": "SFT",
    "reward": "reward",
    "dpo": "DPO",
    "ppo": "PPO",
    "answers": "sampled answers",
    "winrate": "judged answers",
    "benchmarks": "perplexity",
}


class TruncationRow(NamedTuple):
    """A stage's row of the table; ``much`` marks a share that the stage warns of."""

    stage: str
    prompts: str
    messages: str
    answers: str
    pairs: str
    much: bool


def build_rows(metrics: Mapping[str, Mapping[str, Any]]) -> list[TruncationRow]:
    """Return a row for each stage that reports what it truncated."""
    rows = []
    for name, title in STAGES.items():
        values = metrics.get(name, {})
        prompts, messages, answers, pairs = (
            values.get(f"{name}.{what}")
            for what in ("prompts_cut", "messages_dropped", "answers_cut", "pairs_equal_once_cut")
        )
        if prompts is None and answers is None:
            continue
        much = max(prompts or 0, messages or 0, answers or 0) > MUCH_TRUNCATED
        rows.append(
            TruncationRow(
                title,
                _share(prompts),
                _share(messages),
                _share(answers),
                "–" if pairs is None else f"{pairs:,}",
                much,
            )
        )
    return rows


def _share(value: float | None) -> str:
    return "–" if value is None else format_percent(value)
