"""A user's own rows: comparisons, rated answers, and answers to learn from, in any mixture.

A row is {prompt, chosen, rejected}, {prompt, responses, scores}, or {prompt, completion} with a label, a score or neither; the columns may be
called otherwise. A label of a completion says whether it is good; that of a comparison, which side is the better one.

A text may also be messages (messages.py). Of a conversation that ends in an answer, all before it is the prompt; so a comparison of two conversations
needs no prompt of its own, and if it has one, both are read as one. A column that is not read is counted; one that would turn the row's meaning
round is a reason to leave the row out (meanings.py).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tasks.dataset.readers.quarantine import LONGEST_NAME, ExcludedRow, RejectRow, UnusableRow, quote
from tasks.dataset.readers.row_files import Row
from tasks.dataset.sources.chat_messages import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    interleave_turns,
    join_conversations,
    read_list,
    read_text,
    read_texts,
    write_out,
)
from tasks.dataset.sources.column_meanings import (
    ANSWER_LABELS,
    LABELS,
    LONG,
    TIE,
    Columns,
    find_twin,
    find_twin_scores,
    find_value,
    is_contained,
    is_first_better,
    is_first_by_sign,
    is_good_label,
    is_missing,
    read_number,
    refuse_deciding,
    score_sign,
)
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.sources.rendered_chats import strip_end
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.dataset.splits import is_test

SPLIT = "split"  # column that may call a row one of a test set
LABEL = "label"
NO_JUDGES: frozenset[str] = frozenset()


class _Fields:
    """The values of a row, and which of its columns have been read."""

    def __init__(self, fields: Mapping[str, Any], columns: Columns) -> None:
        self.fields, self.columns = fields, columns
        self.read = {name.partition(".")[0] if name not in fields else name for name in columns.ignored}
        self.notes: dict[
            tuple[int, str], Counter[str]
        ] = {}  # what is counted if the row can be used, once however many answers it has
        self.sides: dict[str, str] = {}  # texts that add to the prompt, by column

    def get(self, column: str) -> Any:
        value = find_value(self.fields, column)
        if value is not None:
            self.read.add(column if column in self.fields else column.partition(".")[0])
        return value

    def have(self, *columns: str) -> bool:
        return all(find_value(self.fields, column) is not None for column in columns)

    def note(self, counter: Counter[str], name: str) -> None:
        self.notes[id(counter), name] = counter

    def unread(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.fields.items()
            if name not in self.read and not is_missing(value)
        }


def group_rows(
    rows: Iterable[Row],
    bad: RejectRow,
    columns: Columns,
    *,
    site: str,
    licence: str,
    seen: RowWarnings | None = None,
) -> AnswerGroups:
    """Return the questions that rows make; ``bad`` is told of every row that cannot be used, ``seen`` counts what is odd."""
    found, seen = AnswerGroups(site, licence), seen or RowWarnings.empty()
    for place, fields in rows:
        row = _Fields(fields, columns)
        try:
            split = "evaluation" if _is_held_out(row, seen) or is_test(place.file) else ""
            _add_row(row, split, found, seen)
        except UnusableRow as error:
            bad(place, str(error))
            seen.refused.update(quote(name) for name in fields)
            continue
        except ExcludedRow as reason:
            seen.left_out[str(reason)] += 1
            continue
        for (_, name), counter in row.notes.items():
            counter[name] += 1
        for name in row.unread():
            seen.unread[name if name.isidentifier() and len(name) < LONGEST_NAME else quote(name)[1:-1]] += 1
    return found


def _is_held_out(row: _Fields, seen: RowWarnings) -> bool:
    value = None if SPLIT in row.read else row.fields.get(SPLIT)
    if not isinstance(value, str):
        return False
    row.read.add(SPLIT)
    if not is_test(value):
        return False
    row.note(seen.noticed, f"rows that their column {quote(SPLIT)} keeps for evaluation")
    return True


def _add_row(row: _Fields, split: str, found: AnswerGroups, seen: RowWarnings) -> None:
    columns = row.columns
    row.fields = {**row.fields, **_zip_turns(row)}
    if row.have(columns.chosen, columns.rejected):
        _add_comparison(row, split, found, seen)
    elif row.have(columns.responses, columns.scores):
        _add_ratings(row, columns.responses, split, found, seen)
    elif row.have(columns.completion, columns.scores):
        _add_ratings(row, columns.completion, split, found, seen)
    elif row.have(columns.completion):
        _add_completion(row, split, found, seen)
    else:
        raise UnusableRow(_incomplete_reason(row))


def _zip_turns(row: _Fields) -> dict[str, Any]:
    """Return columns that list the prompts of several turns and the answers to each, also as JSON text, as conversations.

    So does lmsys-arena-human-preference-55k: prompt is ["first", "second"], and response_a as long.
    """
    columns = row.columns
    asked = read_texts(row.fields.get(columns.prompt))
    names = (
        (columns.chosen, columns.rejected)
        if row.have(columns.chosen, columns.rejected)
        else (columns.completion,)
    )
    answers = [read_texts(row.fields.get(name)) for name in names]
    if not asked or any(len(texts) != len(asked) for texts in answers):
        return {}
    return {columns.prompt: asked[0]} | {
        name: interleave_turns(asked, texts) for name, texts in zip(names, answers, strict=True)
    }


def _add_comparison(row: _Fields, split: str, found: AnswerGroups, seen: RowWarnings) -> None:
    columns = row.columns
    names = columns.chosen, columns.rejected
    (asked, first), (asked_too, second) = (_read_answer(row.get(name), name) for name in names)
    if asked != asked_too:
        raise ExcludedRow(
            f"rows whose sides differ before the last answer (columns {quote(names[0])} and {quote(names[1])})"
        )
    first, second = _strip_template(row, [first, second], seen)
    if first == second:
        raise UnusableRow(f"rows whose answers are equal (columns {quote(names[0])} and {quote(names[1])})")
    is_first = _is_first_better(row, *names) if columns.label else True
    prompt = _build_prompt(row, asked, seen)
    if scores := find_twin_scores(row.fields, first=names[0], second=names[1]):
        _check_scores(row, scores, is_first, seen)
    refuse_deciding(row.unread(), NO_JUDGES if columns.label else LABELS, (prompt, first, second))
    found.compare(prompt, *((first, second) if is_first else (second, first)), split=split)


def _is_first_better(row: _Fields, first: str, second: str) -> bool:
    """Return what the label says; where each side has a label of its own, both alike are a tie."""
    column = row.columns.label
    label = _read_label(row, column)
    twin = find_twin(column, row.fields, first=first, second=second) or find_twin(
        column, row.fields, first=second, second=first
    )
    if twin and row.get(twin) == label:
        raise ExcludedRow(TIE)
    if row.columns.negative_is_first is not None:
        return is_first_by_sign(label, row.columns)
    return is_first_better(label, column, first=first, second=second)


def _check_scores(row: _Fields, scores: tuple[str, str], is_first: bool, seen: RowWarnings) -> None:
    """Count the row if its own scores say the opposite; scores that are no numbers say nothing."""
    values = [row.get(name) for name in scores]
    try:
        first, second = (read_number(value, name) for value, name in zip(values, scores, strict=True))
    except UnusableRow:
        return
    if (first < second) if is_first else (first > second):
        row.note(seen.opposed, f"{quote(scores[0])} and {quote(scores[1])}")


def _add_ratings(row: _Fields, column: str, split: str, found: AnswerGroups, seen: RowWarnings) -> None:
    """Take answers with their scores: lists of both, or one answer with one score."""
    columns = row.columns
    scores, responses = read_list(row.get(columns.scores)), row.get(column)
    if isinstance(scores, list):
        responses, judges = read_list(responses), NO_JUDGES
    else:
        responses, scores, judges = [responses], [scores], LABELS
    if not (isinstance(responses, list) and len(responses) == len(scores) > 0):
        raise UnusableRow(
            f"rows whose responses and scores are not lists of one length (columns {quote(column)} and {quote(columns.scores)})"
        )
    sign = score_sign(columns)
    numbers = [sign * read_number(score, columns.scores) for score in scores]
    found_answers = [
        _read_answer(response, column) for response in responses
    ]  # all are read before one is taken
    prompts = [_build_prompt(row, asked, seen) for asked, _ in found_answers]
    answers = _strip_template(row, [answer for _, answer in found_answers], seen)
    refuse_deciding(row.unread(), judges, (*prompts, *answers))
    for prompt, answer, score in zip(prompts, answers, numbers, strict=True):
        found.rate(prompt, answer, score, split=split)


def _add_completion(row: _Fields, split: str, found: AnswerGroups, seen: RowWarnings) -> None:
    """Take an answer to learn from; or, with a label, one that is good or bad."""
    columns = row.columns
    label = columns.label or (LABEL if LABEL in row.fields and LABEL not in columns.ignored else "")
    asked, answer = _read_answer(row.get(columns.completion), columns.completion)
    good = is_good_label(_read_label(row, label), label) if label else None
    prompt = _build_prompt(row, asked, seen)
    (answer,) = _strip_template(row, [answer], seen)
    refuse_deciding(row.unread(), NO_JUDGES if label else ANSWER_LABELS, (prompt, answer))
    if good is None:
        found.answer(prompt, answer, split=split)
    else:
        found.label(prompt, answer, good, split=split)


def _read_label(row: _Fields, column: str) -> Any:
    value = row.get(column)
    if value is None:
        raise UnusableRow(
            f"rows without a label (column {quote(column)}; list it in source.ignored if it is none)"
        )
    return value


def _build_prompt(row: _Fields, asked: list[Message], seen: RowWarnings) -> str:
    """Return the prompt that a row's columns and what was asked in its conversation make together."""
    name = row.columns.prompt
    value = row.get(name)
    text = [] if value is None else read_text(value, name)
    if isinstance(text, list) and isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        row.note(
            seen.noticed,
            "rows whose prompt is a conversation that a chat template has written out, read as messages",
        )
    messages = join_conversations([Message(USER, text)] if isinstance(text, str) else text, asked)
    if messages is None:
        raise UnusableRow(f"rows whose conversation does not begin with the prompt (column {quote(name)})")
    if not any(message.text for message in messages):
        raise UnusableRow(f"rows without a prompt (column {quote(name)})")
    return write_out(_add_context(row, _add_system(row, messages, seen), seen))


def _strip_template(row: _Fields, answers: list[str], seen: RowWarnings) -> list[str]:
    """Return the answers without what a template has written around them: the prompt before, the end of a turn behind."""
    found = [strip_end(answer) for answer in answers]
    if found != answers:
        row.note(
            seen.noticed,
            "rows whose answers end with the end of turn of a chat template, which is taken off them",
        )
    return _strip_prompt(row, found, seen)


def _strip_prompt(row: _Fields, answers: list[str], seen: RowWarnings) -> list[str]:
    """Return the answers without the prompt that all of them begin with, word for word."""
    prompt = row.get(row.columns.prompt)
    start = prompt.strip() if isinstance(prompt, str) else ""
    rests = [answer.removeprefix(start) for answer in answers]
    if len(start) < LONG or not all(
        rest and rest != answer for rest, answer in zip(rests, answers, strict=True)
    ):
        return answers
    if any(start[-1].isalnum() and rest[0].isalnum() for rest in rests):
        return answers  # it ends within a word of theirs
    row.note(seen.noticed, "rows whose answers begin with the whole prompt, which is taken off them")
    return [rest.strip() for rest in rests]


def _add_system(row: _Fields, messages: list[Message], seen: RowWarnings) -> list[Message]:
    name = row.columns.system
    text = _read_side_text(row, name)
    if not text or is_contained(text, [messages[0].text]):
        return messages
    if messages[0].role == SYSTEM:
        raise UnusableRow(f"rows with two system messages (column {quote(name)})")
    row.note(seen.added, name)
    return [Message(SYSTEM, text), *messages]


def _add_context(row: _Fields, messages: list[Message], seen: RowWarnings) -> list[Message]:
    """Put what else belongs to the question after it."""
    for name in row.columns.context:
        text = _read_side_text(row, name)
        if text and not is_contained(text, [messages[-1].text]):
            row.note(seen.added, name)
            messages = [*messages[:-1], messages[-1]._replace(text=f"{messages[-1].text}\n\n{text}".strip())]
    return messages


def _read_side_text(row: _Fields, name: str) -> str:
    """Return the text of a column that adds to the prompt; nothing if it is the column of something else."""
    if name not in row.sides:
        value = None if name in row.read else row.get(name)
        row.sides[name] = "" if value is None else _read_plain_text(value, name)
    return row.sides[name]


def _read_plain_text(value: Any, name: str) -> str:
    if isinstance(value, list) and all(
        isinstance(part, str) for part in value
    ):  # passages; none at all is nothing
        return "\n\n".join(part.strip() for part in value).strip()
    text = str(value) if isinstance(value, int | float) else read_text(value, name)
    if not isinstance(text, str):
        raise UnusableRow(f"rows with messages where a text is wanted (column {quote(name)})")
    return text


def _read_answer(value: object, column: str) -> tuple[list[Message], str]:
    """Return what was asked before an answer, if it is a conversation, and the answer."""
    if is_missing(value):
        raise UnusableRow(f"rows with an empty side (column {quote(column)})")
    text = read_text(value, column)
    asked: list[Message] = []
    if not isinstance(text, str):
        *asked, last = text
        if last.role != ASSISTANT:
            raise UnusableRow(
                f"rows with a conversation that does not end in an answer (column {quote(column)})"
            )
        text = last.text
    if not text:
        raise UnusableRow(f"rows with an empty side (column {quote(column)})")
    return asked, text


def _incomplete_reason(row: _Fields) -> str:
    columns = row.columns
    shapes = ((columns.chosen, columns.rejected), (columns.responses, columns.scores), (columns.completion,))
    missing = [quote(name) for name in _iter_missing(row, shapes)]
    where = (
        "missing or empty: " + ", ".join(missing)
        if missing
        else "none of " + ", ".join(quote(name) for shape in shapes for name in shape)
    )
    return f"rows without a comparison, rated responses or a completion ({where})"


def _iter_missing(row: _Fields, shapes: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """Yield the column that lacks where another of the same shape is there, and columns that are there and hold nothing."""
    for shape in shapes:
        there = [name for name in shape if row.have(name)]
        yield from (name for name in shape if name not in there and (there or name in row.fields))
