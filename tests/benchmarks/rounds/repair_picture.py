"""Draw gold score and reward of a policy against steps, before and after its reward model is trained anew."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from tasks.reporting.charts import HEIGHT, LEFT, WIDTH, Curve, Mark, draw_curves
from tasks.reporting.numbers import format_number

Points = Sequence[Mapping[str, float]]
CHARTS = {
    "independent_score": "gold score, points (10: perfect)",
    "score_reward": "reward that is maximised, standard deviations",
}
NAMES = (
    "phase 1: stale reward model",
    "control: the stale one goes on",
    "refreshed with labels of its answers",
)
COLOURS = ("#0b7285", "#d9480f", "#6741d9")
TOP, LINE = 8, 15  # above the title; from one line of text to the next
ROW = HEIGHT + 2 * LINE
CHARTS_TOP = TOP + LINE * (len(NAMES) + 1)
TEXT = Markup('<text class="{}" x="{}" y="{}">{}</text>')
STYLE = """
svg { font-family: sans-serif; background: #fff; }
text { font-size: 11px; fill: #555; }
.title { font-size: 12px; fill: #111; }
.grid { stroke: #ddd; }
.half { stroke: #555; stroke-dasharray: 3 3; }
circle.ring { fill: none; stroke: #111; stroke-width: 1.5; }
path { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""


def draw_repair(stale: Points, control: Points, refreshed: Points) -> str:
    """Return an SVG file with two charts; the second phase begins where the first one ends."""
    height = CHARTS_TOP + ROW * len(CHARTS)
    opening = Markup('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" width="{}" height="{}">')
    parts = [opening.format(WIDTH, height, 2 * WIDTH, 2 * height), write_style()]
    parts += [TEXT.format(f"s{n}", LEFT, TOP + LINE * (n + 1), name) for n, name in enumerate(NAMES)]
    for number, (name, title) in enumerate(CHARTS.items()):
        top = CHARTS_TOP + ROW * number
        parts.append(TEXT.format("title", LEFT, top + LINE - 4, title))
        parts.append(draw_chart(name, title, (stale, control, refreshed), top + LINE))
    parts.append(TEXT.format("", LEFT, height - 3, "across: rollout batches (steps)"))
    return str(Markup("").join([*parts, Markup("</svg>\n")]))


def write_style() -> Markup:
    """Return the style of the charts, whose colours a page defines otherwise."""
    rules = [
        f"path.s{number} {{ stroke: {colour}; }} circle.s{number}, text.s{number} {{ fill: {colour}; }}"
        for number, colour in enumerate(COLOURS)
    ]
    return Markup("<style>{}</style>").format(Markup(STYLE + "\n".join(rules)))


def draw_chart(name: str, title: str, phases: tuple[Points, Points, Points], top: int) -> Markup:
    """Return the chart of one figure, ``top`` below the edge."""
    stale = phases[0]
    firsts = (0, stale[-1]["step"], stale[-1]["step"])  # step at which each curve begins
    curves = [
        Curve(label, [(first + one["step"], one[name]) for one in points], sparse=True)
        for label, first, points in zip(NAMES, firsts, phases, strict=True)
    ]
    mark = mark_best(stale) if name == "independent_score" else None
    chart = str(draw_curves(curves, title=title, mark=mark))
    place = f'<svg x="0" y="{top}" width="{WIDTH}" height="{HEIGHT}"'
    return Markup(chart.replace("<svg", place, 1))


def mark_best(points: Points) -> Mark:
    """Return the measurement with the best gold score."""
    best = max(points, key=lambda one: one["independent_score"])
    score = best["independent_score"]
    return Mark(best["step"], score, f"best: {format_number(score)} after step {best['step']:.0f}")
