"""Build the report's tables of what alignment costs: perplexity, benchmarks, and RewardBench 2."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from tasks.reporting.numbers import (
    MINUS,
    MISSING,
    format_count,
    format_interval,
    format_number,
    format_percent,
    format_range,
)

LOWER_IS_BETTER = {
    "perplexity": "perplexity of held-out answers",
    "bits_per_byte": "bits per byte of these answers",
}
REWARD_BENCH = "reward_bench."
TIES = f"{REWARD_BENCH}Ties"


class Loss(TypedDict):
    """How much worse a model is than another one."""

    against: str
    text: str
    mark: str  # if it is shown to be worse


class Cell(TypedDict):
    """A model's figure, its interval, and how much worse it is than others."""

    model: str
    value: str
    interval: str
    losses: list[Loss]


class TableRow(TypedDict):
    """One measure of every model."""

    name: str
    about: str
    cells: list[Cell]


class Score(TypedDict):
    """The reward model's score of a subset of RewardBench 2."""

    name: str
    value: str
    interval: str
    rows: str


def build_rows(results: Mapping[str, Any]) -> list[TableRow]:
    """Return a row for each measure of the stage benchmarks."""
    return [_build_row(row, results["models"]) for row in results["rows"]]


def _build_row(row: Mapping[str, Any], models: Sequence[str]) -> TableRow:
    name, measure = row["name"], row["measure"]
    first = row["values"][models[0]]
    if measure in LOWER_IS_BETTER:
        return {
            "name": LOWER_IS_BETTER[measure],
            "about": f"lower is better; {first['n']:,} answers",
            "cells": [_build_cell(row, model) for model in models],
        }
    title = name.removesuffix(".acc_norm").replace(".", ", ")
    how = "accuracy by likelihood per character" if measure == "acc_norm" else "accuracy"
    cells = [_build_cell(row, model) for model in models]
    return {"name": title, "about": f"{how}; {first['n']:,} documents", "cells": cells}


def _build_cell(row: Mapping[str, Any], model: str) -> Cell:
    value, is_rate = row["values"][model], row["measure"] not in LOWER_IS_BETTER
    losses = [_build_loss(tax) for tax in row["taxes"] if tax["ours"] == model]
    return {
        "model": model,
        "value": format_percent(value["value"]) if is_rate else format_number(value["value"]),
        "interval": format_interval(value) if is_rate else format_range(value),
        "losses": losses,
    }


def _build_loss(tax: Mapping[str, Any]) -> Loss:
    value, low, high = (_format_loss(tax["estimate"][part]) for part in ("value", "low", "high"))
    p = f", p {format_number(float(tax['p']))}" if tax["p"] is not None else ""
    return {
        "against": tax["theirs"],
        "text": f"{value} ({low} to {high})",
        "mark": f"worse, shown{p}" if tax["is_shown"] else "",
    }


def _format_loss(value: float | None) -> str:
    """Return a loss with its sign: +2.0; "–" if it is unbounded."""
    if value is None:
        return MISSING
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", MINUS)


def build_scores(metrics: Mapping[str, Any]) -> list[Score]:
    """Return the score of each subset of RewardBench 2, and their mean at the end."""
    scores: list[Score] = []
    for name, value in metrics.items():
        if name.startswith(REWARD_BENCH) and isinstance(value, Mapping):
            rows = format_count(value["n"], "question" if name == TIES else "row")
            title = name.removeprefix(REWARD_BENCH).replace("_", " ")
            score, interval = format_percent(value["value"]), format_interval(value)
            scores.append({"name": title, "value": score, "interval": interval, "rows": rows})
    if total := metrics.get(f"{REWARD_BENCH}total"):
        scores.append({"name": "mean", "value": format_percent(total), "interval": "", "rows": ""})
    return scores
