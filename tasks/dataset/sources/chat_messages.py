"""Read conversations as published sets write them.

Lists of {role, content} or {from, value}, one message alone, either of them as JSON text, or text that a chat
template has written out (rendered_chats.py).
"""

import re
from typing import Any, NamedTuple

from tasks.dataset import conversation
from tasks.dataset.conversation import ASSISTANT, SYSTEM, USER
from tasks.dataset.readers.json_rows import Decoder, replace_lone_surrogates
from tasks.dataset.readers.quarantine import UnusableRow, quote
from tasks.dataset.sources.rendered_chats import parse_messages

ROLES = {USER: USER, "human": USER, "prompter": USER, SYSTEM: SYSTEM, "developer": SYSTEM}
ROLES |= dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "bot", "model", "ai"), ASSISTANT)
LISTS = ("messages", "conversations", "conversation")  # names of the list if it is a field of an object
MESSAGE = r"""\{\s*["'](role|content|from|value)["']\s*:"""
AS_TEXT = re.compile(rf"""\s*(\[\s*{MESSAGE}|{MESSAGE}|\{{\s*["'](messages|conversations?)["']\s*:\s*\[)""")


class Message(NamedTuple):
    """One message of a conversation."""

    role: str
    text: str


def read_text(value: Any, column: str) -> str | list[Message]:
    """Return a column's text, or its messages. Raises Unusable."""
    if isinstance(value, str):
        if AS_TEXT.match(value):
            value = _decode(value, column)
        elif (found := parse_messages(value)) is not None:
            value = found
        else:
            return value.strip()
    if isinstance(value, dict):
        value = next(
            (value[name] for name in LISTS if isinstance(value.get(name), list)), None
        ) or _messages_from_fields(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise UnusableRow(f"rows with a text that is neither a text nor messages (column {quote(column)})")
    return [_read_message(message, column) for message in value]


def read_list(value: Any) -> Any:
    """Return a list that is written as JSON text; anything else unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = Decoder().decode(value.strip())
    except (ValueError, RecursionError):
        return value
    return replace_lone_surrogates(found) if isinstance(found, list) else value


def read_texts(value: Any) -> list[Any]:
    """Return a list of texts or nulls; an empty list for anything else."""
    texts = read_list(value)
    is_list = isinstance(texts, list) and all(text is None or isinstance(text, str) for text in texts)
    return texts if is_list else []


def interleave_turns(prompts: list[Any], answers: list[Any]) -> list[dict[str, Any]]:
    """Return the messages of a conversation whose prompts and answers are two lists."""
    messages = []
    for prompt, answer in zip(prompts, answers, strict=True):
        messages += [{"role": USER, "content": prompt}, {"role": ASSISTANT, "content": answer}]
    return messages


def _messages_from_fields(value: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one message, or several whose roles and contents are lists: {role: [...], content: [...]}.

    `datasets` stores a Sequence so.
    """
    lists = {name: found for name, found in value.items() if isinstance(found, list)}
    if not {"role", "from"}.intersection(lists) or len({len(found) for found in lists.values()}) > 1:
        return [value]
    return [dict(zip(lists, fields, strict=True)) for fields in zip(*lists.values(), strict=True)]


def _decode(text: str, column: str) -> Any:
    """Return messages that are written as JSON text. Raises UnusableRow."""
    decoder = Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError):
        raise UnusableRow(f"rows with messages as text that is no JSON (column {quote(column)})") from None
    if decoder.repeated:
        raise UnusableRow(f"rows with a message that names {decoder.repeated} twice (column {quote(column)})")
    return replace_lone_surrogates(value)


def _read_message(fields: dict[str, Any], column: str) -> Message:
    role = fields.get("role") or fields.get("from")
    content = fields.get("value") if fields.get("content") is None else fields["content"]
    if isinstance(content, list):  # parts, as in APIs that also accept pictures
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [text for text in parts if isinstance(text, str)]
        content = "\n\n".join(texts) if texts and len(texts) == len(parts) else None
    known = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None and isinstance(role, str) and role:
        raise UnusableRow(
            f"rows with a message whose role is neither user, assistant nor system but {quote(role)} "
            f"(column {quote(column)})"
        )
    if known is None or not isinstance(content, str):
        raise UnusableRow(f"rows with a message that lacks its role or content (column {quote(column)})")
    return Message(known, content.strip())


def join_conversations(prompt: list[Message], before: list[Message]) -> list[Message] | None:
    """Return one conversation from a prompt and the messages before the answer; None if they contradict.

    Published sets have the prompt in both, or its first or last message, or a system message in one of them
    only.
    """
    system, turns = _split_off_system(prompt)
    other_system, other_turns = _split_off_system(before)
    if system and other_system and not _are_equal(system, other_system):
        return None
    if not turns or not other_turns:
        turns = turns or other_turns
    elif _are_equal(turns, other_turns[: len(turns)]) or _are_equal(turns, other_turns[-len(turns) :]):
        turns = other_turns
    elif not _are_equal(other_turns, turns[-len(other_turns) :]) and not _is_written_out(turns, other_turns):
        return None
    elif len(turns) == 1:
        turns = other_turns
    return (system or other_system) + turns


def _split_off_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    return ([messages[0]], messages[1:]) if messages and messages[0].role == SYSTEM else ([], messages)


def _are_equal(some: list[Message], others: list[Message]) -> bool:
    return _without_spacing(some) == _without_spacing(others)


def _without_spacing(messages: list[Message]) -> list[tuple[str, list[str]]]:
    return [(role, text.split()) for role, text in messages]


def _is_written_out(turns: list[Message], others: list[Message]) -> bool:
    """Return whether the only text of ``turns`` is the other messages, written out."""
    text = " ".join(turns[0].text.split()).removesuffix("Assistant:").rstrip()
    return len(turns) == 1 and text == " ".join(conversation.write_out(others).split())


def write_out(messages: list[Message]) -> str:
    """Return one message as its text, several with their speakers' names."""
    return messages[0].text if len(messages) == 1 else conversation.write_out(messages)
