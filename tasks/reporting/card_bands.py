"""Draw how the data went from rows to splits: bands of rows, questions, splits and pairs.

Each band is the coloured part of the band above, drawn to the full width again.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from markupsafe import Markup

from tasks.dataset.card import Card
from tasks.reporting.numbers import format_count, format_share

SPLITS = {  # colour and use of each; the names in braces are tables
    "finetune": (
        "p-sft",
        "{finetune} to imitate, and all {corpus} of their questions for the built-in base to read.",
    ),
    "reward": ("p-dpo", "{reward} of {reward_groups} for the reward model and for DPO."),
    "rl": ("p-ppo", "{rl} that PPO answers by itself."),
    "evaluation": (
        "p-chosen",
        "{evaluation} and {evaluation_pairs} that nothing is trained on: policies and reward model are "
        "measured here.",
    ),
}
# nouns of reasons, and their names in card["kept"]
UNITS = {"questions": "questions", "answers": "answers", "comparisons": "pairs", "rows": ""}
RULED = "left out by the rules"
THINNEST = 0.4  # per cent of a ribbon, so that a small part is visible


class Line(NamedTuple):
    """A count with its share of a whole: a line of a list, or a part of a ribbon."""

    label: str
    number: int
    whole: int
    unit: str = ""
    color: str = "s0"

    @property
    def part(self) -> float:
        """Return the share as a number, at most 1."""
        return min(self.number / self.whole, 1) if self.whole else 0.0

    @property
    def share(self) -> str:
        """Return the share as text."""
        return format_share(self.number / self.whole) if self.whole else "–"

    @property
    def bar(self) -> Markup:
        """Return the share as a drawn bar."""
        return draw_ribbon([self])


class Link(NamedTuple):
    """A connection from an interval of one band to an interval of the next, both in shares of the band."""

    color: str
    start: float
    end: float
    low: float
    high: float


class Band(NamedTuple):
    """One step of the data: all of it in parts, and what goes on to the next band."""

    title: str
    parts: Sequence[Line]
    links: Sequence[Link] = ()

    @property
    def drawing(self) -> Markup:
        """Return the drawn parts."""
        return draw_ribbon(self.parts)

    @property
    def flow(self) -> Markup:
        """Return the drawn connections to the next band."""
        shape = Markup('<polygon class="{}" points="{:.3f},0 {:.3f},0 {:.3f},100 {:.3f},100"/>')
        shapes = [
            shape.format(to.color, 100 * to.start, 100 * to.end, 100 * to.high, 100 * to.low)
            for to in self.links
        ]
        opening = Markup(
            '<svg class="flow" viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">'
        )
        return opening + Markup("").join(shapes) + Markup("</svg>")


def build_bands(card: Card) -> list[Band]:
    """Return the bands of rows, questions, splits and pairs."""
    lost: Counter[str] = Counter()
    for reason, count in card["dropped"].items():
        lost[counted_unit(reason)] += count
    splits, pairs = _build_split_lines(card), _build_pair_lines(card)
    kept, answers = card["kept"]["questions"], card["kept"]["answers"]
    split_title = f"{format_count(kept, 'question')} kept with {format_count(answers, 'answer')}, in splits"
    total, drawn_from = card["kept"]["pairs"], card.get("pairs_to_draw_from", 0)
    pair_title = format_count(total, "pair")
    if drawn_from > total:
        pair_title += f", drawn from {drawn_from:,}"
    return [
        _build_row_band(card, lost["rows"]),
        _build_question_band(card, lost["questions"]),
        Band(split_title, splits, _build_links(splits, pairs)),
        Band(pair_title, pairs),
    ]


def _build_row_band(card: Card, lost: int) -> Band:
    rows, bad = card["rows_seen"], sum(card["quarantined"].values())
    used = max(rows - bad - lost, 0)
    parts = [
        Line("used", used, rows),
        Line(RULED, lost, rows, color="tie"),
        Line("cannot be used", bad, rows, color="s1"),
    ]
    read = sorted(card["read"].items(), reverse=True)
    counts = [format_count(count, unit.removesuffix("s")) for unit, count in read if unit != "rows"]
    title = f"{format_count(rows, 'row')} read"
    if counts:
        title += f": {' and '.join(counts)}"
    return Band(title, parts, [Link("s0", start=0, end=parts[0].part, low=0, high=1)])


def _build_question_band(card: Card, lost: int) -> Band:
    kept, paired = card["kept"]["questions"], card["questions_with_pairs"]
    total = kept + lost
    parts = [
        Line("with answers to compare", paired, total),
        Line("with nothing to compare", kept - paired, total, color="pale"),
        Line(RULED, lost, total, color="tie"),
    ]
    links = [Link("s0", start=0, end=kept / total, low=0, high=1)] if total else []
    return Band(f"{format_count(total, 'question')} found", parts, links)


def _build_split_lines(card: Card) -> list[Line]:
    """Return the questions by split."""
    counts, total = card["split_questions"], sum(card["split_questions"].values())
    return [Line(name, counts[name], total, color=SPLITS[name][0]) for name in SPLITS if name in counts]


def _build_pair_lines(card: Card) -> list[Line]:
    """Return the pairs by use: two splits have tables of pairs, the pairs of the others are in none."""
    total, rows = card["kept"]["pairs"], card["rows"]
    used = [
        Line(name, rows.get(table, 0), total, color=SPLITS[name][0])
        for name, table in (("reward", "reward"), ("evaluation", "evaluation_pairs"))
    ]
    rest = max(total - sum(line.number for line in used), 0)
    return [Line("of other splits, not used", rest, total, color="tie"), *used]


def _build_links(above: Sequence[Line], below: Sequence[Line]) -> list[Link]:
    """Return a connection from each part to the part of the same name."""
    upper, lower = _build_intervals(above), _build_intervals(below)
    return [
        Link(line.color, *upper[line.label], *lower[line.label])
        for line in above
        if line.label in lower and line.number
    ]


def _build_intervals(parts: Sequence[Line]) -> dict[str, tuple[float, float]]:
    """Return the start and end of each part, as shares of the band."""
    ends = list(accumulate((line.part for line in parts), initial=0.0))
    return {line.label: (start, end) for line, start, end in zip(parts, ends, ends[1:], strict=False)}


def counted_unit(reason: str) -> str:
    """Return what a reason counts, by its first noun; "" if it concerns one split only."""
    if "split" in reason.split():
        return ""
    return next((word for word in reason.split() if word in UNITS), "rows")


def draw_ribbon(parts: Sequence[Line]) -> Markup:
    """Return a bar of 0 to 100 % in coloured segments, slightly apart."""
    shape = Markup(
        '<rect class="{}" x="{:.3f}" y="0" width="{:.3f}" height="10"><title>{}: {:,} ({})</title></rect>'
    )
    shapes, start = [], 0.0
    for line in parts:
        if line.part:
            width = max(100 * line.part, THINNEST)
            shapes.append(
                shape.format(line.color, min(start, 100 - width), width, line.label, line.number, line.share)
            )
        start += 100 * line.part
    title = ", ".join(f"{line.label}: {line.number:,}" for line in parts)
    opening = Markup(
        '<svg class="ribbon" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{}">'
    ).format(title)
    return opening + Markup("").join(shapes) + Markup("</svg>")
