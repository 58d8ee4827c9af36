"""Draw charts as inline SVG from plain values.

Labels are escaped by markupsafe, colours are CSS classes (``s0``, ``s1``, ... for series) that the page
defines, and equal values give equal bytes. A chart is as wide as its place on the page.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from markupsafe import Markup

from tasks.reporting.numbers import format_percent, format_tick

WIDTH, HEIGHT = 340, 176
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 24  # room for the axes' labels
MAX_POINTS = 400  # a longer curve is averaged down to this many

Point = tuple[float, float]
_format_whole_percent = partial(format_percent, decimals=0)


class Curve(NamedTuple):
    """One line of a chart; of a ``sparse`` one every point is drawn."""

    label: str
    points: Sequence[Point]
    sparse: bool = False


class Mark(NamedTuple):
    """A highlighted point of a chart."""

    x: float
    y: float
    label: str


class Dot(NamedTuple):
    """A measured share of ``n`` observations with its interval, and the forecast share."""

    forecast: float
    value: float
    low: float
    high: float
    n: int


class Frame(NamedTuple):
    """A conversion from values to coordinates of the drawing."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Return the horizontal coordinate of a value."""
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical coordinate of a value."""
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def draw_curves(
    lines: Sequence[Curve],
    *,
    title: str,
    bounds: tuple[float, float] | None = None,
    mark: Mark | None = None,
    only_whole_ticks: bool = True,
) -> Markup:
    """Draw values by step: faintly the values, over them their moving average.

    ``bounds`` fixes the vertical axis; steps have ``only_whole_ticks``.
    """
    finite = [
        line._replace(points=average_down([point for point in line.points if all(map(math.isfinite, point))]))
        for line in lines
    ]
    everything = [point for curve in finite for point in curve.points]
    if not everything:
        return Markup("")
    frame = _choose_frame(everything, bounds)
    parts = [_draw_axes(frame, only_whole_ticks)]
    parts += [
        _draw_dots(frame, n, curve) if curve.sparse else _draw_line(frame, n, curve)
        for n, curve in enumerate(finite)
        if curve.points
    ]
    return _join_shapes([*parts, _draw_mark(frame, mark)] if mark else parts, title)


def draw_reliability(dots: Sequence[Dot], *, title: str, unit: str = "") -> Markup:
    """Draw a reliability diagram: how often forecasts from one half to 1 came true, and the diagonal.

    A dot's area grows with its ``n``.
    """
    if not dots:
        return Markup("")
    frame, most = Frame(0.5, 1, 0, 1), max(dot.n for dot in dots) or 1
    line = Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    circle = Markup('<circle class="s0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>')
    ticks_across = [
        _draw_label(
            frame.x(tick), HEIGHT - 8, _format_whole_percent(tick), "end" if tick > 0.99 else "middle"
        )
        for tick in choose_ticks(0.5, 1)
    ]
    names = [
        _draw_label(frame.x(1) - 2, frame.y(0) - 6, "how sure", "end"),
        _draw_label(frame.x(0.5) + 4, frame.y(1) + 12, "how often right", "start"),
    ]
    parts = [
        _draw_grid(frame, _format_whole_percent),
        *ticks_across,
        *names,
        line.format("half", frame.x(0.5), frame.y(0.5), frame.x(1), frame.y(1)),
    ]
    parts += [
        line.format(
            "over s0", frame.x(dot.forecast), frame.y(dot.low), frame.x(dot.forecast), frame.y(dot.high)
        )
        for dot in dots
    ]
    for dot in dots:
        low, high = _format_whole_percent(dot.low), _format_whole_percent(dot.high)
        label = (
            f"{_format_whole_percent(dot.value)} right ({low} to {high}) "
            f"at {_format_whole_percent(dot.forecast)}: {dot.n:,}{unit}"
        )
        radius = 2 + 4 * math.sqrt(dot.n / most)
        parts.append(circle.format(frame.x(dot.forecast), frame.y(dot.value), radius, label))
    return _join_shapes(parts, title)


def draw_columns(bars: Sequence[tuple[str, float]], *, title: str, unit: str = "") -> Markup:
    """Draw a histogram: one column per (label, count), in the given order."""
    if not bars:
        return Markup("")
    highest = max(count for _, count in bars) or 1
    frame = Frame(0, len(bars), 0, highest * 1.05)
    every = -(-len(bars) // 9)  # at most nine labels fit
    parts = [_draw_grid(frame)]
    for number, (label, count) in enumerate(bars):
        left, right, top = frame.x(number + 0.08), frame.x(number + 0.92), frame.y(count)
        shape = Markup(
            '<rect class="s0" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="1.5">'
            "<title>{}{}: {:,}</title></rect>"
        )
        parts.append(shape.format(left, top, right - left, HEIGHT - BOTTOM - top, label, unit, count))
        if number % every == 0:
            parts.append(_draw_label(frame.x(number + 0.5), HEIGHT - 8, label, "middle"))
    return _join_shapes(parts, title)


def draw_share_bar(
    parts: Sequence[tuple[str, float]],
    *,
    value: float,
    low: float,
    high: float,
    title: str,
    line: float = 0.5,
) -> Markup:
    """Draw a bar of 0 to 100 % in segments (CSS class, share).

    Over it are an interval and a dashed ``line``.
    """
    shapes, start = [], 0.0
    for name, share in parts:
        shapes.append(
            Markup('<rect class="{}" x="{:.2f}" y="4" width="{:.2f}" height="12"/>').format(
                name, 100 * start, 100 * share
            )
        )
        start += share
    lines = [
        ("half", 100 * line, 0, 100 * line, 20),
        ("over", 100 * low, 10, 100 * high, 10),
        ("over", 100 * low, 5, 100 * low, 15),
    ]
    lines += [("over", 100 * high, 5, 100 * high, 15), ("mark", 100 * value, 2, 100 * value, 18)]
    shape = Markup('<line class="{}" x1="{:.2f}" y1="{}" x2="{:.2f}" y2="{}"/>')
    shapes += [shape.format(*one) for one in lines if all(map(math.isfinite, one[1:]))]
    opening = Markup(
        '<svg class="share" viewBox="0 0 100 20" preserveAspectRatio="none" role="img" aria-label="{}">'
        "<title>{}</title>"
    )
    return opening.format(title, title) + Markup("").join(shapes) + Markup("</svg>")


def average_down(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """Return at most ``most`` points, each the mean of consecutive ones."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
    ]


def moving_average(points: Sequence[Point]) -> list[Point]:
    """Return the centred mean over a twelfth of the points; a short curve unchanged."""
    reach = len(points) // 24
    if len(points) < 40:
        return list(points)
    windows = [points[max(0, i - reach) : i + reach + 1] for i in range(len(points))]
    return [
        (x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)
    ]


def choose_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return about ``most`` round numbers from ``low`` to ``high``, 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    return [
        number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _choose_frame(points: Sequence[Point], bounds: tuple[float, float] | None) -> Frame:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = bounds or (min(ys), max(ys))
    if bounds is None:
        low = 0.0 if 0 < low < 0.6 * high else low
        high = 0.0 if 0.6 * low < high < 0 else high
        room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = (low if low == 0 else low - room), (high if high == 0 and low < 0 else high + room)
    return Frame(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, low, high)


def _draw_line(frame: Frame, number: int, curve: Curve) -> Markup:
    smooth = moving_average(curve.points)
    path = Markup('<path class="s{}{}" d="{}"/>')
    raw = (
        path.format(number, " raw", _build_path(frame, curve.points))
        if smooth != list(curve.points)
        else Markup("")
    )
    dot = Markup('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{} {:.4g}</title></circle>')
    x, y = _scale_points(frame, smooth)[-1]
    return (
        raw
        + path.format(number, "", _build_path(frame, smooth))
        + dot.format(number, x, y, curve.label, curve.points[-1][1])
    )


def _draw_dots(frame: Frame, number: int, curve: Curve) -> Markup:
    """Draw every point, joined by a line."""
    circle = Markup('<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{} {:.4g}</title></circle>')
    places = _scale_points(frame, curve.points)
    dots = [
        circle.format(number, x, y, curve.label, value)
        for (x, y), (_, value) in zip(places, curve.points, strict=True)
    ]
    return Markup('<path class="s{}" d="{}"/>').format(number, _build_path(frame, curve.points)) + Markup(
        ""
    ).join(dots)


def _draw_mark(frame: Frame, mark: Mark) -> Markup:
    """Draw a dashed vertical line through the point, a ring around it, and its label away from both."""
    [(x, y)] = _scale_points(frame, [(mark.x, mark.y)])
    side, anchor = (5, "start") if x < (LEFT + WIDTH - RIGHT) / 2 else (-5, "end")
    height = HEIGHT - BOTTOM - 7 if y < (TOP + HEIGHT - BOTTOM) / 2 else TOP + 10
    upright = Markup('<line class="half" x1="{0:.1f}" y1="{1}" x2="{0:.1f}" y2="{2}"/>').format(
        x, TOP, HEIGHT - BOTTOM
    )
    ring = Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="5.5"/>').format(x, y)
    return upright + ring + _draw_label(x + side, height, mark.label, anchor)


def _draw_axes(frame: Frame, only_whole_ticks: bool) -> Markup:
    ticks = choose_ticks(frame.x_low, frame.x_high)
    steps = [tick for tick in ticks if tick == round(tick) or not only_whole_ticks]
    return _draw_grid(frame) + Markup("").join(
        _draw_label(frame.x(tick), HEIGHT - 8, format_tick(tick), "middle") for tick in steps
    )


def _draw_grid(frame: Frame, format_value: Callable[[float], str] = format_tick) -> Markup:
    line = Markup('<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    parts = []
    for tick in choose_ticks(frame.y_low, frame.y_high):
        y = frame.y(tick)
        parts += [
            line.format("grid", LEFT, WIDTH - RIGHT, y, y),
            _draw_label(LEFT - 6, y + 3.5, format_value(tick), "end"),
        ]
    return Markup("").join(parts)


def _draw_label(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _build_path(frame: Frame, points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in _scale_points(frame, points))


def _scale_points(frame: Frame, points: Sequence[Point]) -> list[Point]:
    return [(frame.x(x), frame.y(min(max(y, frame.y_low), frame.y_high))) for x, y in points]


def _join_shapes(parts: Sequence[Markup], title: str) -> Markup:
    opening = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, title
    )
    return opening + Markup("").join(parts) + Markup("</svg>")
