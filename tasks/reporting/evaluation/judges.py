"""Build what the report shows of each judge: its comparisons of policies, and its report card."""

import re
from collections.abc import Mapping
from typing import Any, TypedDict

from markupsafe import Markup

from tasks.reporting import charts
from tasks.reporting.evaluation.policies import NAMES, OPPONENTS, POLICIES, Rate
from tasks.reporting.numbers import format_interval, format_percent


class Comparison(TypedDict):
    """The comparisons of two policies by one judge."""

    ours: str
    theirs: str
    rate: Rate
    tally: Mapping[str, int]  # wins, ties, losses, unparseable, flipped
    verdict: str
    bar: Markup


class Card(TypedDict):
    """A judge's report card: how it decided held-out pairs that voters have ordered."""

    worth: str  # one sentence
    agreement: Rate
    equal_length: Rate | None
    kappa: Rate | None
    longer_wins: Rate
    consistency: Rate
    length_pull: Rate | None
    unparseable: float


class Judge(TypedDict):
    """A judge with its comparisons."""

    name: str
    about: str
    by: str
    rows: list[Comparison]
    card: Card | None


def build_judge(
    judge: Mapping[str, str], metrics: Mapping[str, Any], tallies: Mapping[str, Mapping[str, int]]
) -> Judge:
    by = judge["name"]
    rows = _build_comparisons(by, metrics, tallies)
    card = _build_card(judge, metrics)
    return {
        "name": judge["title"].removeprefix("the "),
        "about": judge["about"],
        "by": by,
        "rows": rows,
        "card": card,
    }


def _build_card(judge: Mapping[str, str], metrics: Mapping[str, Any]) -> Card | None:
    name = f"judge.{judge['name']}"
    if f"{name}.agreement" not in metrics:
        return None
    return {
        "worth": judge["worth"],
        "agreement": metrics[f"{name}.agreement"],
        "equal_length": metrics.get(f"{name}.equal_length"),
        "kappa": metrics.get(f"{name}.kappa"),
        "longer_wins": metrics[f"{name}.longer_wins"],
        "consistency": metrics[f"{name}.consistency"],
        "length_pull": metrics.get(f"{name}.length_pull"),
        "unparseable": metrics[f"{name}.unparseable"],
    }


def _build_comparisons(
    by: str, metrics: Mapping[str, Any], tallies: Mapping[str, Mapping[str, int]]
) -> list[Comparison]:
    rows: list[Comparison] = []
    for name, rate in metrics.items():
        if match := re.fullmatch(rf"{re.escape(by)}_win_rate\.(\w+)_vs_(\w+)", name):
            ours, theirs = match.groups()
            tally = tallies[f"{by}.{ours}_vs_{theirs}"]
            rows.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "rate": rate,
                    "tally": tally,
                    "verdict": describe_result(rate),
                    "bar": _draw_comparison_bar(ours, theirs, rate, tally),
                }
            )
    return sorted(rows, key=lambda row: (OPPONENTS.index(row["theirs"]), POLICIES.index(row["ours"])))


def describe_result(rate: Rate) -> str:
    """Return 'beats', 'loses to', or 'is level with' if the interval contains one half."""
    if rate["low"] > 0.5:
        return "beats"
    return "loses to" if rate["high"] < 0.5 else "is level with"


def _draw_comparison_bar(ours: str, theirs: str, rate: Rate, tally: Mapping[str, int]) -> Markup:
    total = sum(tally[name] for name in ("wins", "ties", "losses")) or 1
    parts = [
        (f"p-{ours}", tally["wins"] / total),
        ("tie", tally["ties"] / total),
        (f"p-{theirs}", tally["losses"] / total),
    ]
    names = f"{NAMES.get(ours, ours)} against {NAMES.get(theirs, theirs)}"
    title = f"{names}: {format_percent(rate['value'])} ({format_interval(rate)})"
    return charts.draw_share_bar(parts, value=rate["value"], low=rate["low"], high=rate["high"], title=title)
