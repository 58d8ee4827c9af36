"""What the numbers of a data card look like: scores, gaps, answers a question and lengths, each as a drawn histogram with its median."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from tasks.reporting import charts

VOTES = "round(log2(1 + votes)), one more if accepted, −1 if voted down."
SCORES = {
    "own": "As the source scores them; where it compares answers, how many stand below one in a row.",
    "hh-rlhf": "1 for an answer that beat another.",
    "stack-exchange-paired": "How many answers stand below one in a row.",
}
FEWEST_COLUMNS, MOST_COLUMNS = 8, 24  # a histogram of more values is drawn in steps
FARTHEST = 1e100  # two scores near the end of all numbers have no finite gap


class Histogram(NamedTuple):
    """A drawn one; ``median`` is a value, or the bin that has it."""

    title: str
    note: str
    median: str
    drawing: Markup


def histograms(card: Mapping[str, Any]) -> list[Histogram]:
    """Scores, gaps, answers a question and lengths, each with its median."""
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
            columns, unit = _columns(counts)
            drawing = charts.columns(_framed(columns), title=title, unit=unit)
            drawn.append(Histogram(title, note, charts.short(counts[_middle(counts)][0]), drawing))
    for name, title in (("answer_chars", "Answer length"), ("prompt_chars", "Question length")):
        if bins := {row["from"]: row["count"] for row in card.get(name) or ()}:
            columns = [(_size(start), bins.get(start, 0)) for start in _doubling(min(bins), max(bins))]
            middle = sorted(bins)[_middle(sorted(bins.items()))]
            note = "Characters of Markdown; each column is twice as wide as the one before it."
            drawing = charts.columns(_framed(columns), title=title, unit=" characters and up")
            drawn.append(Histogram(title, note, f"{middle:,}–{2 * middle - 1:,}", drawing))
    return drawn


def _doubling(low: int, high: int) -> list[int]:
    """Starts of the bins from ``low`` to ``high``, empty ones too."""
    return [low << k for k in range((high // low).bit_length())]


def _columns(counts: Sequence[tuple[float, int]]) -> tuple[list[tuple[str, int]], str]:
    """Columns, and what a label needs: whole numbers stand at equal steps, empty ones too; many values share a column with their neighbours."""
    low, high = counts[0][0], counts[-1][0]
    whole = all(value == round(value) for value, _ in counts)
    if not whole and len(counts) <= MOST_COLUMNS:
        return [(charts.short(value), count) for value, count in counts], ""
    step = -(-(high - low + 1) // MOST_COLUMNS) if whole else (high - low) / (MOST_COLUMNS - 1)
    found: Counter[int] = Counter()
    for value, count in counts:
        found[min(int((value - low) / step), MOST_COLUMNS - 1)] += (
            count  # far from zero, one more is none more
        )
    return [
        (charts.short(low + place * step), found[place]) for place in range(max(found) + 1)
    ], "" if step == 1 else " and up"


def _framed(columns: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """With empty room on both sides where there are few: two columns would be two walls."""
    room = [("", 0)] * ((FEWEST_COLUMNS - len(columns)) // 2)
    return [*room, *columns, *room]


def _middle(counts: Sequence[tuple[float, int]]) -> int:
    """The place of the lower median."""
    half, seen = sum(count for _, count in counts) / 2, 0
    for place, (_, count) in enumerate(counts):
        seen += count
        if seen >= half:
            return place
    return 0


def _size(chars: int) -> str:
    return f"{chars >> 10}k" if chars >= 1024 else str(chars)
