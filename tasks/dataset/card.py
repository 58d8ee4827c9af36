"""Define the fields of card.json, which the data stage writes and the report reads.

Field names and their meaning are part of the data artifact: changing one changes its digest.
"""

from typing import Any, TypedDict


class Kept(TypedDict):
    """Numbers of all kept questions, answers and pairs, over all splits."""

    questions: int
    answers: int
    pairs: int


# Number of texts with at least ``from`` and fewer than ``below`` characters; "from" is a keyword of Python.
SizeBin = TypedDict("SizeBin", {"from": int, "below": int, "count": int})


class ScoreCount(TypedDict):
    """Number of answers with this score."""

    score: float
    count: int


class GapCount(TypedDict):
    """Number of pairs whose scores differ by this gap."""

    gap: float
    count: int


class AnswersCount(TypedDict):
    """Number of questions with this many answers."""

    answers: int
    count: int


class StatisticsCard(TypedDict):
    """Fields of card.json that describe the kept questions."""

    site: str
    sites: dict[str, int]
    kept: Kept
    questions_with_pairs: int
    pairs_to_draw_from: int
    scores: list[ScoreCount]
    gaps: list[GapCount]
    answers_per_question: list[AnswersCount]
    answer_chars: list[SizeBin]
    prompt_chars: list[SizeBin]
    longer_wins: float
    older_wins: float | None  # None: the source has no dates
    licences: dict[str, int]
    examples: list[dict[str, Any]]  # rows of the table of pairs


class ColumnsCard(TypedDict):
    """Fields of card.json about a user's own rows: numbers of rows by column, file or sentence."""

    test_files: dict[str, int]
    unread_columns: dict[str, int]
    added_columns: dict[str, int]
    opposed: dict[str, int]
    noticed: dict[str, int]


class Card(StatisticsCard, ColumnsCard):
    """All of card.json."""

    kind: str  # of the source
    rules: dict[str, Any]  # settings of the section data
    read: dict[str, int]
    dropped: dict[str, int]  # by reason
    masked: dict[str, int]  # by kind of personal data
    quarantined: dict[str, int]  # by reason
    rows_seen: int
    other_files: list[str]
    split_questions: dict[str, int]
    rows: dict[str, int]  # by table
