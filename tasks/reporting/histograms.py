"""Draw the histograms of a data card: scores, gaps, answers per question and lengths."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from tasks.reporting import charts
from tasks.reporting.numbers import format_tick

VOTES = "round(log2(1 + votes)), one more if accepted, −1 if voted down."
SCORES = {
    "own": "As the source scores them; where it compares answers, how many stand below one in a row.",
    "hh-rlhf": "1 for an answer that beat another.",
    "stack-exchange-paired": "How many answers stand below one in a row.",
}
FEWEST_COLUMNS, MOST_COLUMNS = 8, 24  # more values are binned
FARTHEST = 1e100  # the difference of two scores near the largest float is infinite


class Histogram(NamedTuple):
    """A drawn histogram; ``median`` is a value or a bin."""

    title: str
    note: str
    median: str
    drawing: Markup


def draw_histograms(card: Mapping[str, Any]) -> list[Histogram]:
    """Return the histograms of which the card has counts."""
    numbers = [
        ("scores", "score", "Answer scores", SCORES.get(card["kind"], VOTES)),
        (
            "gaps",
            "gap",
            "Gap of a pair",
            "How much higher the better answer scores; the smaller, the closer to chance.",
        ),
        (
            "answers_per_question",
            "answers",
            "Answers a question has",
            "A question with a single answer has nothing to compare.",
        ),
    ]
    drawn = []
    for name, key, title, note in numbers:
        if counts := sorted(
            (max(min(row[key], FARTHEST), -FARTHEST), row["count"]) for row in card.get(name) or ()
        ):
            columns, unit = _build_columns(counts)
            drawing = charts.draw_columns(_pad_columns(columns), title=title, unit=unit)
            drawn.append(Histogram(title, note, format_tick(counts[_median_index(counts)][0]), drawing))
    for name, title in (("answer_chars", "Answer length"), ("prompt_chars", "Question length")):
        if bins := {row["from"]: row["count"] for row in card.get(name) or ()}:
            columns = [
                (_format_size(start), bins.get(start, 0)) for start in _bin_starts(min(bins), max(bins))
            ]
            middle = sorted(bins)[_median_index(sorted(bins.items()))]
            note = "Characters of Markdown; each column is twice as wide as the one before it."
            drawing = charts.draw_columns(_pad_columns(columns), title=title, unit=" characters and up")
            drawn.append(Histogram(title, note, f"{middle:,}–{2 * middle - 1:,}", drawing))
    return drawn


def _bin_starts(low: int, high: int) -> list[int]:
    """Return the starts of all bins from ``low`` to ``high``, also of empty ones."""
    return [low << k for k in range((high // low).bit_length())]


def _build_columns(counts: Sequence[tuple[float, int]]) -> tuple[list[tuple[str, int]], str]:
    """Return (label, count) of each column, and what to add to a label.

    Whole numbers have equal steps, with empty columns; many values are binned.
    """
    low, high = counts[0][0], counts[-1][0]
    whole = all(value == round(value) for value, _ in counts)
    if not whole and len(counts) <= MOST_COLUMNS:
        return [(format_tick(value), count) for value, count in counts], ""
    step = -(-(high - low + 1) // MOST_COLUMNS) if whole else (high - low) / (MOST_COLUMNS - 1)
    found: Counter[int] = Counter()
    for value, count in counts:
        found[min(int((value - low) / step), MOST_COLUMNS - 1)] += (
            count  # far from zero, one more is none more
        )
    return [
        (format_tick(low + place * step), found[place]) for place in range(max(found) + 1)
    ], "" if step == 1 else " and up"


def _pad_columns(columns: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the columns with empty ones on both sides if there are few, which would be too wide."""
    room = [("", 0)] * ((FEWEST_COLUMNS - len(columns)) // 2)
    return [*room, *columns, *room]


def _median_index(counts: Sequence[tuple[float, int]]) -> int:
    """Return the index of the lower median."""
    half, seen = sum(count for _, count in counts) / 2, 0
    for place, (_, count) in enumerate(counts):
        seen += count
        if seen >= half:
            return place
    return 0


def _format_size(chars: int) -> str:
    return f"{chars >> 10}k" if chars >= 1024 else str(chars)
