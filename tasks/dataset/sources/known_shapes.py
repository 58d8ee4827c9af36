"""Recognise the rows of well-known published sets by their columns, so that no setting has to name these.

A row that has the columns prompt, chosen and rejected (or the other names of the settings) is read by them; a
known shape is looked for only if the settings name no column themselves.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tasks.dataset.sources.column_meanings import Columns, find_value


class Shape(NamedTuple):
    """The columns of a published set."""

    name: str
    required: tuple[str, ...]
    absent: tuple[str, ...]  # columns with which the row is something else
    meanings: dict[str, Any]  # fields of Columns

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Return whether a row has the shape."""
        has_all = all(find_value(fields, name) is not None for name in self.required)
        return has_all and not any(find_value(fields, name) is not None for name in self.absent)


PAIR = ("chosen", "rejected")
ANSWERS = (*PAIR, "responses", "completion")
SHAPES = (
    Shape(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        ("prompt", *ANSWERS),
        {"prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B", "label": "labels"},
    ),
    Shape(
        "UltraFeedback",
        ("instruction", "completions.response", "completions.fine-grained_score"),
        ("prompt", *ANSWERS),
        {
            "prompt": "instruction",
            "responses": "completions.response",
            "scores": "completions.fine-grained_score",  # overall_score has errors: its authors say so
        },
    ),
    Shape(
        "Nectar",
        ("prompt", "answers.answer", "answers.rank"),
        ANSWERS,
        {"responses": "answers.answer", "scores": "answers.rank", "scores_are_ranks": True},
    ),
    Shape(
        "HelpSteer2",
        ("prompt", "response", "helpfulness"),
        ANSWERS,
        {"responses": "response", "scores": "helpfulness"},
    ),
    Shape("Orca pairs", ("question", *PAIR), ("prompt",), {"prompt": "question"}),
    Shape(
        "Orca",
        ("system_prompt", "question", "response"),
        ("prompt", *ANSWERS),
        {"prompt": "question", "completion": "response", "system": "system_prompt"},
    ),
    Shape(
        "Alpaca",
        ("instruction", "output"),
        ("prompt", *ANSWERS),
        {"prompt": "instruction", "completion": "output"},
    ),
    # these may have a prompt too, which is a part of the conversation, as in UltraChat
    Shape("TRL (messages)", ("messages",), ANSWERS, {"completion": "messages"}),
    Shape("ShareGPT", ("conversations",), ANSWERS, {"completion": "conversations"}),
    Shape("a conversation", ("conversation",), ANSWERS, {"completion": "conversation"}),
)


def recognise(fields: Mapping[str, Any], columns: Columns) -> tuple[Columns, str]:
    """Return the meanings of a row's columns, and the name of its known shape; "" if it has none.

    ``columns`` are those of the settings; if they name any column, these are the meanings.
    """
    if columns._replace(ignored=()) != Columns():
        return columns, ""
    for shape in SHAPES:
        if shape.fits(fields):
            return columns._replace(**shape.meanings), shape.name
    return columns, ""
