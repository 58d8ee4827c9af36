"""Read a user's own rows: comparisons, rated answers, and answers to learn from, in any mixture.

A row is {prompt, chosen, rejected}, {prompt, responses, scores}, or {prompt, completion} with a label, a
score or neither; the columns can have other names, of which known_shapes.py has those of published sets. A
completion's label says whether it is good; a comparison's label says which side is better.

A text can also be messages (chat_messages.py). In a conversation that ends in an answer, everything before
the answer is the prompt; so a comparison of two conversations needs no column for the prompt, and if it has
one, both are joined. A column that is not read is counted; a column that would reverse the row's meaning is a
reason to reject the row (column_meanings.py).
"""

from collections.abc import Iterable, Iterator
from typing import Any

from tasks.dataset.readers.quarantine import ExcludedRow, RejectRow, UnusableRow, quote
from tasks.dataset.readers.row_files import Row
from tasks.dataset.sources.chat_messages import interleave_turns, read_list, read_texts
from tasks.dataset.sources.column_meanings import (
    ANSWER_LABELS,
    LABELS,
    TIE,
    Columns,
    find_twin,
    find_twin_scores,
    is_first_better,
    is_first_by_sign,
    is_good_label,
    read_number,
    refuse_deciding,
    score_sign,
)
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.sources.known_shapes import recognise
from tasks.dataset.sources.own_prompts import build_prompt, read_answer, strip_template
from tasks.dataset.sources.row_fields import RowFields
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.dataset.splits import is_test

SPLIT = "split"  # column that may put a row into a test set
LABEL = "label"
NO_LABELS: frozenset[str] = frozenset()


def group_rows(
    rows: Iterable[Row],
    reject: RejectRow,
    columns: Columns,
    *,
    site: str,
    licence: str,
    warnings: RowWarnings | None = None,
) -> AnswerGroups:
    """Return the answers of all rows, by prompt.

    ``reject`` is called for every row that cannot be used; ``warnings`` counts what is unusual.
    """
    groups, warnings = AnswerGroups(site, licence), warnings or RowWarnings.empty()
    for place, fields in rows:
        meanings, shape = recognise(fields, columns)
        row = RowFields(fields, meanings, warnings)
        if shape:
            row.warn(warnings.noticed, f"rows read by the columns of {shape}")
        try:
            split = "evaluation" if _is_held_out(row) or is_test(place.file) else ""
            _add_row(row, split, groups)
        except UnusableRow as error:
            reject(place, str(error))
            warnings.refused.update(quote(name) for name in fields)
        except ExcludedRow as reason:
            warnings.left_out[str(reason)] += 1
        else:
            row.count_warnings()
    return groups


def _is_held_out(row: RowFields) -> bool:
    """Return whether the row's own column assigns it to a test set."""
    value = None if SPLIT in row.read else row.fields.get(SPLIT)
    if not isinstance(value, str):
        return False
    row.read.add(SPLIT)
    if not is_test(value):
        return False
    row.warn(row.warnings.noticed, f"rows that their column {quote(SPLIT)} keeps for evaluation")
    return True


def _add_row(row: RowFields, split: str, groups: AnswerGroups) -> None:
    columns = row.columns
    row.fields = {**row.fields, **_zip_turns(row)}
    if row.have(columns.chosen, columns.rejected):
        _add_comparison(row, split, groups)
    elif row.have(columns.responses, columns.scores):
        _add_ratings(row, columns.responses, split, groups)
    elif row.have(columns.completion, columns.scores):
        _add_ratings(row, columns.completion, split, groups)
    elif row.have(columns.completion):
        _add_completion(row, split, groups)
    else:
        raise UnusableRow(_incomplete_reason(row))


def _zip_turns(row: RowFields) -> dict[str, Any]:
    """Return columns with lists of prompts and answers of several turns (also as JSON text) as conversations.

    lmsys-arena-human-preference-55k has such rows: prompt is ["first", "second"], and response_a as long.
    """
    columns = row.columns
    prompts = read_texts(row.fields.get(columns.prompt))
    names: tuple[str, ...] = (columns.completion,)
    if row.have(columns.chosen, columns.rejected):
        names = columns.chosen, columns.rejected
    answers = [read_texts(row.fields.get(name)) for name in names]
    if not prompts or any(len(texts) != len(prompts) for texts in answers):
        return {}
    conversations = [interleave_turns(prompts, texts) for texts in answers]
    return {columns.prompt: prompts[0]} | dict(zip(names, conversations, strict=True))


def _add_comparison(row: RowFields, split: str, groups: AnswerGroups) -> None:
    columns = row.columns
    names = columns.chosen, columns.rejected
    (before, first), (other_before, second) = (read_answer(row.get(name), name) for name in names)
    if before != other_before:
        raise ExcludedRow(
            f"rows whose sides differ before the last answer (columns {quote(names[0])} and "
            f"{quote(names[1])})"
        )
    first, second = strip_template(row, [first, second])
    if first == second:
        raise UnusableRow(f"rows whose answers are equal (columns {quote(names[0])} and {quote(names[1])})")
    is_first = _is_first_better(row, *names) if columns.label else True
    prompt = build_prompt(row, before)
    if scores := find_twin_scores(row.fields, first=names[0], second=names[1]):
        _check_scores(row, scores, is_first)
    refuse_deciding(row.unread(), NO_LABELS if columns.label else LABELS, (prompt.text, first, second))
    better, worse = (first, second) if is_first else (second, first)
    groups.add_comparison(prompt.text, better, worse, split=split, messages=prompt.messages)


def _is_first_better(row: RowFields, first: str, second: str) -> bool:
    """Return what the label says. If each side has a label of its own and both are equal, it is a tie."""
    column = row.columns.label
    label = row.label(column)
    twin = find_twin(column, row.fields, first=first, second=second)
    twin = twin or find_twin(column, row.fields, first=second, second=first)
    if twin and row.get(twin) == label:
        raise ExcludedRow(TIE)
    if row.columns.negative_is_first is not None:
        return is_first_by_sign(label, row.columns)
    return is_first_better(label, column, first=first, second=second)


def _check_scores(row: RowFields, scores: tuple[str, str], is_first: bool) -> None:
    """Count the row if its own scores contradict the comparison; scores that are no numbers are ignored."""
    values = [row.get(name) for name in scores]  # both count as read
    try:
        first, second = (read_number(value, name) for value, name in zip(values, scores, strict=True))
    except UnusableRow:
        return
    if (first < second) if is_first else (first > second):
        row.warn(row.warnings.opposed, f"{quote(scores[0])} and {quote(scores[1])}")


def _add_ratings(row: RowFields, column: str, split: str, groups: AnswerGroups) -> None:
    """Add answers with their scores: lists of both, or one answer with one score."""
    columns = row.columns
    scores, responses = read_list(row.get(columns.scores)), row.get(column)
    if isinstance(scores, list):
        responses, labels = read_list(responses), NO_LABELS
    else:
        responses, scores, labels = [responses], [scores], LABELS
    if not (isinstance(responses, list) and len(responses) == len(scores) > 0):
        raise UnusableRow(
            "rows whose responses and scores are not lists of one length "
            f"(columns {quote(column)} and {quote(columns.scores)})"
        )
    sign = score_sign(columns)
    numbers = [sign * read_number(score, columns.scores) for score in scores]
    read = [read_answer(response, column) for response in responses]  # all or none are added
    prompts = [build_prompt(row, before) for before, _ in read]
    answers = strip_template(row, [answer for _, answer in read])
    refuse_deciding(row.unread(), labels, (*(prompt.text for prompt in prompts), *answers))
    for prompt, answer, score in zip(prompts, answers, numbers, strict=True):
        groups.add_rating(prompt.text, answer, score, split=split, messages=prompt.messages)


def _add_completion(row: RowFields, split: str, groups: AnswerGroups) -> None:
    """Add an answer to learn from; with a label, one that is good or bad."""
    columns = row.columns
    label = columns.label
    if not label and LABEL in row.fields and LABEL not in columns.ignored:
        label = LABEL
    before, answer = read_answer(row.get(columns.completion), columns.completion)
    is_good = is_good_label(row.label(label), label) if label else None
    prompt = build_prompt(row, before)
    (answer,) = strip_template(row, [answer])
    refuse_deciding(row.unread(), NO_LABELS if label else ANSWER_LABELS, (prompt.text, answer))
    if is_good is None:
        groups.add_answer(prompt.text, answer, split=split, messages=prompt.messages)
    else:
        groups.add_label(prompt.text, answer, is_good, split=split, messages=prompt.messages)


def _incomplete_reason(row: RowFields) -> str:
    columns = row.columns
    shapes = ((columns.chosen, columns.rejected), (columns.responses, columns.scores), (columns.completion,))
    missing = [quote(name) for name in _iter_missing(row, shapes)]
    names = [quote(name) for shape in shapes for name in shape]
    where = f"missing or empty: {', '.join(missing)}" if missing else f"none of {', '.join(names)}"
    return f"rows without a comparison, rated responses or a completion ({where})"


def _iter_missing(row: RowFields, shapes: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield columns without a value if another of the same shape has one or if the row has them."""
    for shape in shapes:
        present = [name for name in shape if row.have(name)]
        yield from (name for name in shape if name not in present and (present or name in row.fields))
