"""Format metrics, results and the outcome of stages as text."""

from typing import Any

from tasks.config.trusted_judges import choose_judge

KEY_FIGURES = (
    "reward_accuracy.votes",
    "dpo.implicit_accuracy",
    "dpo.kl",
    "ppo.kl",
)  # beside the win rates of the best judge there is


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
    judge = choose_judge(metrics)
    return [
        name for name in metrics if name in KEY_FIGURES or (judge and name.startswith(f"{judge}_win_rate."))
    ]


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
