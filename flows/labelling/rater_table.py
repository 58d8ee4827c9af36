"""Print how far raters agree, and what their labels say of each of them."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from flows.display.terminal import console

COLUMNS = ("rater", "labels", "ties", "both bad", "skipped", "gold questions right", "left", "seconds", "")
NAMES = {"alpha": "Krippendorff's alpha of all raters", "kappa": "Cohen's kappa of the two with most pairs"}


def print_raters(found: Mapping[str, Any]) -> None:
    """Print the content of agreement.json."""
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for one in found["raters"]:
        verdicts = one["verdicts"]
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.1f}"
        cells = (
            one["name"],
            f"{sum(verdicts.values()):,}",
            *(f"{verdicts.get(kind, 0):,}" for kind in ("tie", "both_bad", "skip")),
            _format_share(one["right"]),
            _format_share(one["left"]),
            seconds,
            "flagged: left out" if one["flagged"] else "",
        )
        table.add_row(*map(Text, cells))
    screen = console()
    screen.print(table)
    for name, text in NAMES.items():
        value = found.get(name)
        if value is None:
            screen.print(f"{text}: no pair has two labels", markup=False)
        else:
            ends = f"{value['low']:.2f} to {value['high']:.2f}"
            screen.print(f"{text}: {value['value']:.2f} ({ends}, {value['n']:,} pairs)", markup=False)


def _format_share(value: Mapping[str, Any]) -> str:
    return f"{value['value']:.0%} of {value['n']:,}" if value["n"] else ""
