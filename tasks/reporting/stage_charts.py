"""Draw each stage's metrics."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from markupsafe import Markup

from tasks.reporting.charts import Curve, Mark, draw_curves
from tasks.reporting.numbers import (
    format_interval,
    format_number,
    format_percent,
    format_points,
    format_range,
)
from tasks.reporting.stage_panels import FACTS, HELD_OUT, PANELS


class Chart(NamedTuple):
    """A drawn panel; ``legend`` holds each curve's label and last value."""

    title: str
    note: str
    legend: list[tuple[str, str]]
    drawing: Markup


SPARSE = (HELD_OUT, "independent_score")  # measured now and then
SHARES = (
    "agreement", "accuracy", "ended", "wins", "win_rate", "reproduced", "worst_attack", "wrong_name", ".ece",
    "s_cut",
)  # fmt: skip
DIFFERENCES = (".over_",)  # of shares


def draw_charts(
    stage: str, lines: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any] = MappingProxyType({})
) -> list[Chart]:
    """Return the charts of a stage's logged steps.

    The chart of the held-out loss marks the kept weights, by the stage's ``metrics``.
    """
    drawn = []
    for panel in PANELS.get(stage, ()):
        named = [
            (name, Curve(label, _read_points(lines, name), sparse=name in SPARSE))
            for name, label in _name_curves(panel.metrics, lines)
        ]
        found = [curve for _, curve in named if curve.points]
        if panel.only_if_it_moves and len({y for curve in found for _, y in curve.points}) < 2:
            continue
        mark = next(
            (find_kept_weights(stage, curve.points, metrics) for name, curve in named if name == HELD_OUT),
            None,
        )
        if drawing := draw_curves(found, title=f"{stage}: {panel.title}", bounds=panel.bounds, mark=mark):
            drawn.append(
                Chart(
                    panel.title,
                    panel.note,
                    [(curve.label, format_number(curve.points[-1][1])) for curve in found],
                    drawing,
                )
            )
    return drawn


def _name_curves(metrics: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the name and label of each curve of a panel, whose names may end in *."""
    logged = dict.fromkeys(name for line in lines for name in line)
    for name, label in metrics.items():
        prefix = name.removesuffix("*")
        if prefix == name:
            yield name, label
        else:
            found = [one for one in logged if one.startswith(prefix)]
            yield from ((one, one.removeprefix(prefix).replace("_", " ")) for one in found)


def _read_points(lines: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def find_kept_weights(
    stage: str, evaluations: Sequence[tuple[float, float]], metrics: Mapping[str, Any]
) -> Mark | None:
    """Return the evaluation step whose weights were kept.

    It is the step with the stage's own held-out loss; without one, the step with the lowest loss. The best
    step alone is not enough: with keep=last other weights are kept.
    """
    final, best = metrics.get(f"{stage}.{HELD_OUT}"), metrics.get(f"{stage}.best_step")
    evaluations = [one for one in evaluations if math.isfinite(one[1])]
    if not evaluations:
        return None
    lowest = min(loss for _, loss in evaluations)
    word, wanted = ("lowest", lowest) if final is None else ("kept", final)
    step, loss = min(evaluations, key=lambda one: (abs(one[1] - wanted), one[0] != best, one[0]))
    return Mark(step, loss, f"{word}: {format_number(loss)} at step {step:,}")


def drawn_metrics(stage: str, lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the metrics that the stage's charts show."""
    return {f"{stage}.{HELD_OUT}", f"{stage}.best_step"} if _read_points(lines, HELD_OUT) else set()


def format_facts(metrics: Mapping[str, Any], drawn: Collection[str] = ()) -> list[tuple[str, str]]:
    """Return (name, value) of the metrics of a stage's summary that are not drawn, with readable names."""
    places = {name: place for place, name in enumerate(FACTS)}
    names = sorted(
        (name for name in metrics if name not in drawn), key=lambda name: places.get(name, len(places))
    )
    return [
        (FACTS.get(name, name.partition(".")[2].replace("_", " ")), format_metric(name, metrics[name]))
        for name in names
    ]


def format_metric(name: str, value: Any) -> str:
    """Return a metric as text, with its interval if it has one.

    Shares are in per cent, differences of shares in points.
    """
    if any(word in name for word in DIFFERENCES):
        value, low, high = (format_points(value[part]) for part in ("value", "low", "high"))
        return f"{value} points ({low} to {high})"
    is_share = any(word in name for word in SHARES)
    if not isinstance(value, Mapping):
        return format_percent(value) if is_share else format_number(value)
    if is_share:
        return f"{format_percent(value['value'])} ({format_interval(value)})"
    return f"{format_number(value['value'])} ({format_range(value)})"
