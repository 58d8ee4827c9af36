"""Format metrics, results and the outcome of stages as text."""

from collections.abc import Mapping
from typing import Any

KEY_FIGURES = (
    "reward_accuracy.votes",
    "dpo.implicit_accuracy",
    "dpo.kl",
    "ppo.kl",
)  # beside the win rates of the best judge there is
JUDGES = {
    "gold": "the gold scorer",
    "lm": "a language model",
    "held_out": "a reward model that PPO has never seen",
    "reward": "the reward model, which PPO was trained to please",
}
POLICIES = {"ppo": "PPO", "dpo": "DPO"}


def format_outcome(stage: dict[str, Any]) -> str:
    return "reused" if stage["cached"] else "built"


def format_not_run(causes: list[str]) -> str:
    """Return the outcome of a stage whose inputs could not be built: "not run: ppo and dpo failed"."""
    return f"not run: {' and '.join(causes)} failed"


def format_metric(value: Any) -> str:
    """A metric as text: '0.731 (0.690 to 0.768, n 500)' or '3.420'."""
    if not isinstance(value, dict):
        return _format_number(value)
    text = _format_number(value.get("value"))
    interval = (
        f"{_format_number(value['low'])} to {_format_number(value['high'])}"
        if value.get("low") is not None and value.get("high") is not None
        else ""
    )
    count = f"n {value['n']}" if value.get("n") is not None else ""
    extra = ", ".join(filter(None, [interval, count]))
    return f"{text} ({extra})" if extra else text


def key_figures(metrics: dict[str, Any]) -> list[str]:
    """Return the names of the figures that a run is judged by; all others are in its summary and report."""
    judge = best_judge(metrics)
    return [
        name for name in metrics if name in KEY_FIGURES or (judge and name.startswith(f"{judge}_win_rate."))
    ]


def best_judge(metrics: Mapping[str, Any]) -> str:
    """Return the judge whose verdict is shown: the first that its report card speaks for, else the first."""
    judges = [judge for judge in JUDGES if any(name.startswith(f"{judge}_win_rate.") for name in metrics)]
    return next((judge for judge in judges if _is_trusted(judge, metrics)), judges[0] if judges else "")


def _is_trusted(judge: str, metrics: Mapping[str, Any]) -> bool:
    """Return whether a judge agrees with held-out votes more than chance and the longer answer do.

    The gold scorer is the truth, which votes are noisy about. A judge without a report card, for want of
    held-out votes, is not doubted.
    """
    card, rule = (metrics.get(f"judge.{judge}.{name}") for name in ("agreement", "longer_wins"))
    return judge == "gold" or not card or not rule or card["low"] > max(0.5, rule["value"])


def _format_number(value: Any) -> str:
    if isinstance(value, float):
        return (
            f"{value:.3g}"
            if 0 < abs(value) < 0.01
            else f"{value:.3f}"
            if abs(value) < 1000
            else f"{value:,.0f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)
