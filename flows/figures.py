"""A metric, and what became of a stage, as text."""

from typing import Any


def told(stage: dict[str, Any]) -> str:
    return "reused" if stage["cached"] else "built"


def figure(value: Any) -> str:
    """A metric as text: '0.731 (0.690 to 0.768, n 500)' or '3.420'."""
    if not isinstance(value, dict):
        return _number(value)
    text = _number(value.get("value"))
    interval = f"{_number(value['low'])} to {_number(value['high'])}" if value.get("low") is not None and value.get("high") is not None else ""
    count = f"n {value['n']}" if value.get("n") is not None else ""
    extra = ", ".join(filter(None, [interval, count]))
    return f"{text} ({extra})" if extra else text


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
