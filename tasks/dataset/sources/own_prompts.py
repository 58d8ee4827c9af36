"""Build the prompt and the answers of one of a user's own rows from its columns and conversations."""

from typing import NamedTuple

from tasks.dataset.conversation import ASSISTANT, SYSTEM, USER, Messages
from tasks.dataset.readers.quarantine import UnusableRow, quote
from tasks.dataset.sources.chat_messages import (
    Message,
    join_conversations,
    read_text,
    write_out,
)
from tasks.dataset.sources.column_meanings import LONG, is_contained, is_missing
from tasks.dataset.sources.rendered_chats import strip_end
from tasks.dataset.sources.row_fields import RowFields


class Prompt(NamedTuple):
    """A prompt as one text and, if it is a conversation, as messages."""

    text: str
    messages: Messages  # (): one user's message, the text


def read_answer(value: object, column: str) -> tuple[list[Message], str]:
    """Return the messages before an answer, if it ends a conversation, and the answer. Raises UnusableRow."""
    if is_missing(value):
        raise UnusableRow(f"rows with an empty side (column {quote(column)})")
    text = read_text(value, column)
    before: list[Message] = []
    if not isinstance(text, str):
        *before, last = text
        if last.role != ASSISTANT:
            raise UnusableRow(
                f"rows with a conversation that does not end in an answer (column {quote(column)})"
            )
        text = last.text
    if not text:
        raise UnusableRow(f"rows with an empty side (column {quote(column)})")
    return before, text


def build_prompt(row: RowFields, before: list[Message]) -> Prompt:
    """Return the prompt of a row's columns and of the messages before its answer. Raises UnusableRow."""
    name = row.columns.prompt
    value = row.get(name)
    text = [] if value is None else read_text(value, name)
    if isinstance(text, list) and isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
        row.warn(
            row.warnings.noticed,
            "rows whose prompt is a conversation that a chat template has written out, read as messages",
        )
    messages = join_conversations([Message(USER, text)] if isinstance(text, str) else text, before)
    if messages is None:
        raise UnusableRow(f"rows whose conversation does not begin with the prompt (column {quote(name)})")
    if not any(message.text for message in messages):
        raise UnusableRow(f"rows without a prompt (column {quote(name)})")
    messages = _add_context(row, _add_system(row, messages))
    if len(messages) == 1:
        return Prompt(messages[0].text, ())
    if messages[-1].role != USER:
        raise UnusableRow(f"rows whose prompt does not end with the user's message (column {quote(name)})")
    return Prompt(write_out(messages), tuple((role, text) for role, text in messages))


def strip_template(row: RowFields, answers: list[str]) -> list[str]:
    """Return the answers without a repeated prompt before them and a template's end of turn after them."""
    stripped = [strip_end(answer) for answer in answers]
    if stripped != answers:
        row.warn(
            row.warnings.noticed,
            "rows whose answers end with the end of turn of a chat template, which is taken off them",
        )
    return _strip_prompt(row, stripped)


def _strip_prompt(row: RowFields, answers: list[str]) -> list[str]:
    """Return the answers without the prompt, if all of them begin with it word for word."""
    prompt = row.get(row.columns.prompt)
    start = prompt.strip() if isinstance(prompt, str) else ""
    rests = [answer.removeprefix(start) for answer in answers]
    have_prompt = all(rest and rest != answer for rest, answer in zip(rests, answers, strict=True))
    if len(start) < LONG or not have_prompt:
        return answers
    if any(start[-1].isalnum() and rest[0].isalnum() for rest in rests):
        return answers  # the prompt ends within a word of an answer
    row.warn(row.warnings.noticed, "rows whose answers begin with the whole prompt, which is taken off them")
    return [rest.strip() for rest in rests]


def _add_system(row: RowFields, messages: list[Message]) -> list[Message]:
    """Return the messages with the row's system message before them, unless they contain it."""
    name = row.columns.system
    text = row.prompt_part(name)
    if not text or is_contained(text, [messages[0].text]):
        return messages
    if messages[0].role == SYSTEM:
        raise UnusableRow(f"rows with two system messages (column {quote(name)})")
    row.warn(row.warnings.added, name)
    return [Message(SYSTEM, text), *messages]


def _add_context(row: RowFields, messages: list[Message]) -> list[Message]:
    """Return the messages with the texts of the row's context columns after the last one."""
    for name in row.columns.context:
        text = row.prompt_part(name)
        if text and not is_contained(text, [messages[-1].text]):
            row.warn(row.warnings.added, name)
            joined = f"{messages[-1].text}\n\n{text}".strip()
            messages = [*messages[:-1], messages[-1]._replace(text=joined)]
    return messages
