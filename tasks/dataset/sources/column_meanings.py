"""Interpret the columns of a user's own rows: find values by meaning, read scores and labels.

Also finds unread columns that would reverse a row's meaning.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from math import isfinite, isnan
from typing import Any, NamedTuple

from tasks.dataset.readers.quarantine import ExcludedRow, UnusableRow, quote

MISSING_VALUES = frozenset(
    ("NULL", "null", "Null", "(null)", "NaT", "#N/A", "NaN", "nan", "NA", "N/A", "<NA>", "\\N", "None")
)  # written by tools for a missing value
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+")
NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)
TIE = "rows whose label calls it a tie"
LONG = 20  # characters; a shorter text may be in another by chance
SHORT = 40  # characters of the longest label
MOST_NAMED = 8  # columns in a reason
LONGEST_COLUMN = 200  # characters of a name that is interpreted; keeps the caches of names small
TRUE, FALSE = frozenset("1 true yes y".split()), frozenset("0 false no n".split())
GOOD = frozenset(
    "good chosen accepted desirable positive like liked up thumbs_up better preferred correct safe".split()
)
BAD = frozenset(
    "-1 bad rejected undesirable negative dislike disliked down thumbs_down worse incorrect wrong unsafe "
    "harmful toxic".split()
)
NEGATIVE = frozenset(
    "swapped flipped reversed rejected undesirable bad worse incorrect wrong unsafe harmful toxic toxicity "
    "spam".split()
)
NOT = frozenset("not no neither nor never isn t".split())
ORDER = re.compile(r"\W*(?P<left>[a-z0-9]+) *(?P<sign>>+|<+|[=~]+) *(?P<right>[a-z0-9]+)\W*")
TIES = frozenset("tie tied equal both neither none same draw".split())

LABELS = frozenset(
    "label labels winner preferred preference better choice verdict safer swapped flipped".split()
)
RATINGS = frozenset(
    "score scores rating ratings rank ranks ranking reward quality grade stars votes upvotes likes "
    "helpfulness correctness".split()
)
ANSWER_LABELS = (
    LABELS
    | RATINGS
    | frozenset(
        "correct accepted liked thumbs feedback safe unsafe harmful toxic toxicity chosen rejected".split()
    )
)
RANKS = frozenset(("rank", "ranks", "ranking"))
TWIN_RATINGS = RATINGS - RANKS
PROMPTS = frozenset(
    "system systemprompt systemmessage sys instruction instructions history conversationhistory "
    "chathistory".split()
)
PROMPTS |= frozenset(
    "dialoguehistory dialoghistory input inputs context persona preamble background passage".split()
)


class Columns(NamedTuple):
    """Names of the columns by meaning; a.b is the field b of the column a."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    responses: str = "responses"
    scores: str = "scores"
    completion: str = "completion"
    label: str = ""  # "": the column label of completions
    scores_are_ranks: bool | None = None
    negative_is_first: bool | None = None
    system: str = "system"
    context: tuple[str, ...] = ("input", "context")
    ignored: tuple[str, ...] = ()


def find_value(fields: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column, None if it is missing.

    Of a list of objects a.b is the list of their fields b.
    """
    value = fields.get(column)
    if value is None and "." in column:
        name, *path = column.split(".")
        value = fields.get(name)
        for part in path:
            value = _field(value, part)
    return None if is_missing(value) else value


def _field(value: Any, name: str) -> Any:
    if isinstance(value, list) and name.isdecimal():  # summaries.0.text is of the first element
        return value[int(name)] if len(name) < len(str(LONGEST_COLUMN)) and int(name) < len(value) else None
    if isinstance(value, list):
        return [_field(one, name) for one in value]
    return value.get(name) if isinstance(value, dict) else None


def is_missing(value: Any) -> bool:
    """Return whether a value stands for a missing one."""
    if isinstance(value, float | Decimal):
        return isnan(value)
    return value is None or (isinstance(value, str) and value.strip() in MISSING_VALUES)


def score_sign(columns: Columns) -> int:
    """Return -1 if the lowest score is best, else 1.

    Raises UnusableRow if the column's name says that scores are ranks and the settings do not.
    """
    if columns.scores_are_ranks is None and RANKS.intersection(split_words(columns.scores)):
        raise UnusableRow(
            f"rows whose scores are ranks by their name (column {quote(columns.scores)}; say so in "
            "source.scores_are_ranks)"
        )
    return -1 if columns.scores_are_ranks else 1


def read_number(value: Any, column: str) -> float:
    """Return a score as a number, also from a Decimal or a text in figures. Raises UnusableRow."""
    if isinstance(value, int | float | Decimal) or (isinstance(value, str) and NUMBER.fullmatch(value)):
        try:
            found = float(value)
        except (OverflowError, ValueError):  # an integer beyond all floats, a signalling NaN
            found = float("nan")
        if isfinite(found):
            return found
    raise UnusableRow(f"rows with a score that is no number (column {quote(column)})")


@lru_cache(maxsize=1024)  # rows have the same columns
def split_words(name: str) -> tuple[str, ...]:
    """Return the words of a column's name in lower case: response_0 has two, human-ref-A three."""
    return tuple(word.lower() for word in WORD.findall(name))


def is_good_label(value: Any, column: str) -> bool:
    """Return whether a label calls an answer good. Raises UnusableRow."""
    text = _normalise_label(value)
    if text in TRUE or text in FALSE:
        return (text in TRUE) is not bool(NEGATIVE.intersection(split_words(column)))
    if text in GOOD or text in BAD:
        return text in GOOD
    raise UnusableRow(
        f"rows whose label says neither good nor bad (column {quote(column)}; list it in source.ignored if "
        "it is none)"
    )


def is_first_by_sign(value: Any, columns: Columns) -> bool:
    """Return whether a label whose sign names the better side, as -3 to 3 in HelpSteer3, names the first.

    Raises UnusableRow, or ExcludedRow for 0.
    """
    strength = read_number(value, columns.label)
    if not strength:
        raise ExcludedRow(TIE)
    return (strength < 0) is columns.negative_is_first


def is_first_better(value: Any, column: str, *, first: str, second: str) -> bool:
    """Return whether the label of a comparison names the answer of the column ``first``.

    A label may be a column's name, the end of one (A, model_b, 0 of response_0), an order of both (A>B), or
    true, 1 and the like. The latter mean the first column, or the column that ends as the label's own name
    does (winner_model_b). Raises UnusableRow, or ExcludedRow for a tie.
    """
    text = _normalise_label(value)
    if text in (first.lower(), second.lower()):
        return text == first.lower()
    ends = _distinguishing_words(first, second)
    found = split_words(text) if text.isdigit() or not NUMBER.fullmatch(text) else ()  # -1 is no 1
    if ends[0] != ends[1] and set(ends) <= set(found):
        return _is_first_in_order(text, ends, column)
    if ends[0] != ends[1] and _last_word(found) in ends and NOT.isdisjoint(found):
        return _last_word(found) == ends[0]
    is_of_numbers = (
        all(end.isdigit() for end in ends) and ends[0] != ends[1] and NUMBER.fullmatch(text)
    )  # 0 of response_1 and response_2
    if (text in TRUE or text in FALSE) and not is_of_numbers:
        about_second = _last_word(split_words(column)) == ends[1] != ends[0] or bool(
            NEGATIVE.intersection(split_words(column))
        )
        return (text in TRUE) is not about_second
    if TIES & set(split_words(text)):
        raise ExcludedRow(TIE)
    hint = (
        "; if its sign tells, say in source.negative_is_first which side is meant"
        if NUMBER.fullmatch(text)
        else ""
    )
    raise UnusableRow(f"rows whose label names neither side (column {quote(column)}{hint})")


def _is_first_in_order(text: str, ends: tuple[str, str], column: str) -> bool:
    """Return whether a label that names both sides, such as [[A>B]] or b << a, ranks the first higher."""
    found = ORDER.fullmatch(text)
    if not found or {found["left"], found["right"]} != set(ends):
        raise UnusableRow(f"rows whose label names both sides (column {quote(column)})")
    if found["sign"][0] in "=~":
        raise ExcludedRow(TIE)
    return (found["left"] == ends[0]) is (found["sign"][0] == ">")


def _distinguishing_words(first: str, second: str) -> tuple[str, str]:
    """Return the words in which two columns' names differ, or their last words.

    0 and 1 for summaries.0.text and summaries.1.text.
    """
    differing = [
        pair for pair in zip(split_words(first), split_words(second), strict=False) if pair[0] != pair[1]
    ]
    if len(split_words(first)) == len(split_words(second)) and len(differing) == 1:
        return differing[0]
    return _last_word(split_words(first)), _last_word(split_words(second))


def _last_word(found: tuple[str, ...]) -> str:
    return found[-1] if found else ""


def _normalise_label(value: Any) -> str:
    """Return a label in lower case, a whole number without its fraction; "" for what is no label."""
    if isinstance(value, str | bool):
        text = str(value).strip().lower() if len(str(value)) <= LONGEST_COLUMN else ""
        return text.removesuffix(".0") if NUMBER.fullmatch(text) else text
    if isinstance(value, int | float | Decimal):
        return f"{float(value):g}" if -100 < value < 100 else ""
    return ""


def refuse_deciding(unread: Mapping[str, Any], judges: frozenset[str], texts: Sequence[str]) -> None:
    """Raise UnusableRow if an unread column may reverse the row's meaning, or belongs to its prompt.

    ``judges`` are words in the names of columns that judge the row's answers; ``texts`` are those read from
    the row.
    """
    known = {name: split_words(name) for name in unread if len(name) <= LONGEST_COLUMN}
    deciding = [
        name for name, found in known.items() if judges.intersection(found) and _may_be_label(unread[name])
    ]
    if deciding:
        raise UnusableRow(
            _deciding_reason(deciding, "turn their meaning round", "source.scores or source.label")
        )
    prompts = [
        name
        for name, found in known.items()
        if "".join(found) in PROMPTS and _is_unread_text(unread[name], texts)
    ]
    if prompts:
        raise UnusableRow(
            _deciding_reason(prompts, "belong to their prompt", "source.system or source.context")
        )


def _deciding_reason(names: list[str], what: str, where: str) -> str:
    """Return the reason for a row with such columns; it names all of them at once."""
    more = [f"{len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    *before, last = [*map(quote, names[:MOST_NAMED]), *more]
    if not before:
        return (
            f"rows whose column {last} may {what} (name it in {where}, or in source.ignored if it does not)"
        )
    return (
        f"rows whose columns {', '.join(before)} and {last} may {what} "
        f"(name each in {where}, or in source.ignored if it does not)"
    )


def _is_unread_text(value: Any, texts: Sequence[str]) -> bool:
    return _is_text(value) and not (isinstance(value, str) and is_contained(value.strip(), texts))


def is_contained(text: str, texts: Iterable[str]) -> bool:
    """Return whether a text equals another, or is a part of one and too long to be so by chance."""
    return any(text == other or (len(text) >= LONG and text in other) for other in texts)


def _may_be_label(value: Any) -> bool:
    return isinstance(value, bool | int | float | Decimal) or (
        isinstance(value, str) and 0 < len(value.strip()) <= SHORT
    )


def _is_text(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value) and isinstance(value, str | list | dict)


def find_twin_scores(names: Iterable[str], *, first: str, second: str) -> tuple[str, str] | None:
    """Return the columns of both sides' scores: score_A and score_B of human_ref_A and human_ref_B."""
    return _find_twin_scores(tuple(name for name in names if len(name) <= LONGEST_COLUMN), first, second)


@lru_cache(maxsize=8)  # rows of a file have the same names
def _find_twin_scores(names: tuple[str, ...], first: str, second: str) -> tuple[str, str] | None:
    for name in names:
        if TWIN_RATINGS.intersection(split_words(name)) and (
            twin := find_twin(name, names, first=first, second=second)
        ):
            return name, twin
    return None


def find_twin(name: str, names: Iterable[str], *, first: str, second: str) -> str | None:
    """Return the column that is for ``second`` what ``name`` is for ``first``."""
    one = [word for word in split_words(first) if word not in split_words(second)]
    other = [word for word in split_words(second) if word not in split_words(first)]
    if len(one) != 1 or len(other) != 1 or one[0] not in split_words(name):
        return None
    wanted = tuple(other[0] if word == one[0] else word for word in split_words(name))
    return next((twin for twin in names if len(twin) <= LONGEST_COLUMN and split_words(twin) == wanted), None)
