"""What the report and the data card tell of texts that were cut to the models' limits, stage by stage."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.reporting.stage_charts import percent

STAGES = {
    "sft": "SFT",
    "reward": "reward",
    "dpo": "DPO",
    "ppo": "PPO",
    "winrate": "win rates",
}
MUCH = 0.25  # tasks.rlhf.batches.truncation's threshold of a warning, which draws in transformers


class Row(NamedTuple):
    """A stage's line of the table; ``much`` marks a share that the stage warns of."""

    stage: str
    prompts: str
    answers: str
    pairs: str
    much: bool


def rows_of(metrics: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return a row for each stage that says what it cut."""
    found = []
    for name, title in STAGES.items():
        some = metrics.get(name, {})
        prompts, answers, pairs = (
            some.get(f"{name}.{what}") for what in ("prompts_cut", "answers_cut", "pairs_equal_once_cut")
        )
        if prompts is None and answers is None:
            continue
        much = max(prompts or 0, answers or 0) > MUCH
        found.append(
            Row(title, _share(prompts), _share(answers), "–" if pairs is None else f"{pairs:,}", much)
        )
    return found


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
