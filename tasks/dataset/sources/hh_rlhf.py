"""Read Anthropic's hh-rlhf (Bai et al. 2022, 2204.05862).

Rows are {chosen, rejected}: two dialogues that differ in the last answer. A dialogue is "\\n\\nHuman:
...\\n\\nAssistant: ..." repeated. The question is everything before the last answer: of one turn its text
alone, of several the dialogue with its speakers' names. The DPO paper (Rafailov et al. 2023) uses the rows of
one turn.
"""

import re
from collections import Counter
from collections.abc import Iterable

from tasks.dataset.conversation import ASSISTANT, USER, Messages
from tasks.dataset.readers.quarantine import RejectRow
from tasks.dataset.readers.row_files import Row
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.splits import is_test

SITE, LICENCE = "hh-rlhf", "MIT"
HUMAN_MARK, ASSISTANT_MARK = "\n\nHuman:", "\n\nAssistant:"
SPEAKER = re.compile(f"{HUMAN_MARK}|{ASSISTANT_MARK}")
TURN = re.compile(f"({SPEAKER.pattern})")
SIDES_DIFFER, SEVERAL_TURNS, EQUAL_ANSWERS = RULES = (
    "rows whose sides differ before the last answer",
    "rows of several turns",
    "rows whose answers are equal",
)


def group_rows(
    rows: Iterable[Row], dropped: Counter[str], reject: RejectRow, *, one_turn: bool
) -> AnswerGroups:
    """Return the comparisons of all rows; rows of files that are named as a test set are for evaluation.

    ``dropped`` counts rows that a rule leaves out (RULES); ``reject`` is called for rows that are no pair of
    dialogues.
    """
    groups = AnswerGroups(SITE, LICENCE)
    for place, fields in rows:
        parts = split_dialogues(fields.get("chosen"), fields.get("rejected"), one_turn=one_turn)
        if isinstance(parts, str):
            if parts in RULES:
                dropped[parts] += 1
            else:
                reject(place, parts)
        else:
            split = "evaluation" if is_test(place.file) else ""
            groups.add_comparison(*parts, split=split, messages=read_turns(parts[0]))
    return groups


def read_turns(question: str) -> Messages:
    """Return the messages of a question of several turns, as `split_dialogues` returns it; else none."""
    _, *parts = TURN.split(f"\n\n{question}")
    if len(parts) < 3 or not question.startswith(HUMAN_MARK.strip()):
        return ()
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple((USER if speaker == HUMAN_MARK else ASSISTANT, text.strip()) for speaker, text in turns)


def split_dialogues(chosen: object, rejected: object, *, one_turn: bool) -> tuple[str, str, str] | str:
    """Return (question, better answer, worse answer), or the reason why the row has none."""
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return "rows without two dialogues"
    before, _, better = chosen.rpartition(ASSISTANT_MARK)
    other, _, worse = rejected.rpartition(ASSISTANT_MARK)
    if before != other:
        return SIDES_DIFFER
    speakers = SPEAKER.findall(before)
    if (
        not speakers
        or not before.startswith(HUMAN_MARK)
        or HUMAN_MARK in better + worse
        or speakers[-1] != HUMAN_MARK
    ):
        return "rows that are no dialogue"
    if one_turn and len(speakers) > 1:
        return SEVERAL_TURNS
    question = before.removeprefix(HUMAN_MARK).strip() if len(speakers) == 1 else before.strip()
    if not question or not better.strip() or not worse.strip():
        return "rows with an empty side"
    if better.strip() == worse.strip():
        return EQUAL_ANSWERS
    return question, better.strip(), worse.strip()
