"""Format numbers, shares and intervals as the pages show them."""

import math
from collections.abc import Mapping
from typing import Any

MINUS, SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
MISSING = "\N{EN DASH}"


def format_percent(share: float, *, decimals: int = 1) -> str:
    """Return a share in per cent: 64.1 %."""
    return f"{100 * share:.{decimals}f}{SPACE}%" if math.isfinite(share) else MISSING


def format_share(share: float) -> str:
    """Return a share in per cent; a small one is never shown as 0, and one below 1 never as 100 %."""
    if 0 < share < 0.001:
        return f"<{SPACE}0.1{SPACE}%"
    return format_percent(min(share, 0.999 if share < 1 else share))


def format_interval(rate: Mapping[str, Any]) -> str:
    """Return the interval of a share: 64.1 to 72.0 %."""
    return f"{100 * rate['low']:.1f} to {format_percent(rate['high'])}"


def format_points(difference: float) -> str:
    """Return the difference of two shares in points: −4.2."""
    return f"{100 * difference:.1f}".replace("-", MINUS) if math.isfinite(difference) else MISSING


def format_number(value: Any) -> str:
    """Return a number with about three significant digits; "–" for none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return MISSING if value is None or isinstance(value, float) else str(value)
    size = abs(value)
    if isinstance(value, int) or value == 0 or size >= 1000:
        text = f"{value:,.0f}"
    elif size < 0.001:
        text = f"{value:.1e}".replace("e-0", "e-")
    elif size < 1:
        text = f"{value:.3f}"
    else:
        text = f"{value:.2f}" if size < 100 else f"{value:.1f}"
    return text.replace("-", MINUS)


def format_tick(value: float) -> str:
    """Return a number for an axis: 0.05, 12, 1.5k, 2M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}".replace("-", MINUS) if abs(value) >= 1e-9 else "0"


def format_count(count: int, noun: str) -> str:
    """Return a number of things: '1 pair', '4,032 pairs'."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_range(value: Mapping[str, Any]) -> str:
    """Return the interval of a number: 0.71 to 0.85."""
    return f"{format_number(value['low'])} to {format_number(value['high'])}"
