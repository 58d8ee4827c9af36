"""Encode prompts that are conversations: several turns, or a system message.

With text.template=chat the tokenizer's chat template renders them. The plain templates write every turn as
they write a question and its answer, as the chat template does that `alignflow export` writes for them; so
human-assistant has the form of hh-rlhf. No text of a message becomes a control token.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches.control_tokens import Markers, encode_marked, free_characters, locate_tokens, mark
from tasks.rlhf.batches.prompts import (
    PLAIN,
    Template,
    chat_turn,
    prefix_ids,
    render,
    shorten_text,
)
from tasks.system.errors import InputError

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
Messages = Sequence[tuple[str, str]]  # (role, text); the last one is the user's
_PROBES = {SYSTEM: "Be 41927 terse.", ASSISTANT: "It is 48263.", USER: "What is 73915?"}


class Fitted(NamedTuple):
    """The messages of a conversation that fit into a limit of tokens."""

    messages: Messages
    ids: list[int]  # up to where the next answer starts
    dropped: Messages  # the oldest ones, which are left out


class Rendered(NamedTuple):
    """A conversation as a template writes it."""

    text: str  # parts that would become control tokens are marked
    markers: Markers
    answers: list[tuple[int, int]]  # characters of the earlier answers, with the ends of their turns
    prefix: list[int]  # ids before the text's


def fit(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, template: Template, max_tokens: int
) -> Fitted:
    """Encode a conversation up to where its next answer starts, with at most ``max_tokens``.

    The oldest turns are dropped first; system message and last question stay. If these alone are too long,
    the end of the question is cut off; a system message that leaves no room for it is dropped. Raises
    InputError.
    """

    def encode(kept: Messages) -> list[int]:
        return encode_messages(tokenizer, kept, template)

    ids = encode(messages)
    if len(ids) <= max_tokens:
        return Fitted(messages, ids, [])
    system = list(messages[:1]) if messages[0][0] == SYSTEM else []
    turns = messages[len(system) :]
    starts = [place for place, (role, _) in enumerate(turns) if role == USER]

    def fits(start: int) -> bool:
        return len(encode([*system, *turns[start:]])) <= max_tokens

    start = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)]
    *before, (_, question) = turns[start:]
    dropped = list(turns[:start])
    if system and not before and len(encode([*system, (USER, "")])) >= max_tokens:
        dropped = [*system, *dropped]
    else:
        before = [*system, *before]
    text, ids = shorten_text(
        question,
        encode([*before, (USER, question)]),
        lambda text: encode([*before, (USER, text)]),
        max_tokens=max_tokens,
    )
    return Fitted([*before, (USER, text)], ids, dropped)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: Template) -> list[int]:
    """Return the ids of a conversation up to where its next answer starts. Raises InputError."""
    rendered = render_messages(tokenizer, messages, template)
    return rendered.prefix + encode_marked(tokenizer, rendered.text, rendered.markers)


def find_answers(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: Template) -> list[bool]:
    """Return which ids of `encode_messages` belong to earlier answers and the ends of their turns.

    A token that an answer shares with the text after it belongs to the answer, as in transformers' masks.
    An answer that the template alters (thoughts that it cuts off) is left out. Raises InputError.
    """
    if len(messages) == 1:
        return [False] * len(encode_messages(tokenizer, messages, template))
    if not tokenizer.is_fast:
        raise InputError(
            "sft.loss_on=every needs a fast tokenizer, which says where its tokens stand in the text: give "
            "the model's folder a tokenizer.json, or set sft.loss_on=last."
        )
    rendered = render_messages(tokenizer, messages, template)
    places = locate_tokens(tokenizer, rendered.text, rendered.markers)
    counted = [
        any(start < last and max(end, start + 1) > first for first, last in rendered.answers)
        for start, end in places
    ]
    return [False] * len(rendered.prefix) + counted


def render_messages(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: Template) -> Rendered:
    """Write a conversation up to where its next answer starts. Raises InputError."""
    adapted = adapt_roles(tokenizer, messages, template)
    start, end, first, last = free_characters("".join(text for _, text in messages), 4)
    markers = start, end
    marked = [(role, mark(tokenizer, text, markers)) for role, text in adapted]
    framed = [(role, f"{first}{text}{last}" if role == ASSISTANT else text) for role, text in marked]
    if template == "chat":
        turn = chat_turn(tokenizer)
        whole = render(tokenizer, framed, f"{len(framed)} messages") + turn.prefill
        text, answers = _unframe(whole, (first, last), turn.opening, turn.closing)
        return Rendered(text, markers, answers, [])
    ending = "" if template == "human-assistant" else str(tokenizer.eos_token)  # hh-rlhf has no end token
    text, answers = _unframe(_write_plain(framed, template, ending), (first, last), " ", ending)
    return Rendered(text, markers, answers, list(prefix_ids(tokenizer)))


def adapt_roles(tokenizer: PreTrainedTokenizerBase, messages: Messages, template: Template) -> Messages:
    """Return the messages with roles in an order that the template can write.

    A system message that is not the first, or that the template knows nothing of (Gemma's, the plain ones),
    is put before the question that follows it; neighbours of one role become one message; an answer before
    the first question is left out if the template refuses it.
    """
    has_system = template == "chat" and knows_role(tokenizer, SYSTEM)
    folded: list[tuple[str, str]] = []
    waiting: list[str] = []
    for place, (role, text) in enumerate(messages):
        if role == SYSTEM and not (has_system and place == 0):
            waiting.append(text)
        elif role == USER:
            folded.append((role, "\n\n".join([*waiting, text])))
            waiting = []
        else:
            folded.append((role, text))
    merged = [
        (role, "\n\n".join(text for _, text in group)) for role, group in groupby(folded, lambda one: one[0])
    ]
    is_opened = next(role for role, _ in merged if role != SYSTEM) == ASSISTANT
    if is_opened and not (template == "chat" and knows_role(tokenizer, ASSISTANT)):
        merged.pop(1 if merged[0][0] == SYSTEM else 0)
    return merged


def knows_role(tokenizer: PreTrainedTokenizerBase, role: str) -> bool:
    """Return whether the chat template can write a message of a role before the first question."""
    return _knows_role(tokenizer, str(tokenizer.chat_template), role)


@lru_cache(maxsize=16)
def _knows_role(tokenizer: PreTrainedTokenizerBase, _: str, role: str) -> bool:
    rendered = _render_probe(tokenizer, role, _PROBES[role])
    if _PROBES[role] not in rendered or _PROBES[USER] not in rendered:
        return False
    # templates that know two roles only write any other one as an answer, or as a question
    others = {USER, ASSISTANT} - {role}
    return rendered not in [_render_probe(tokenizer, other, _PROBES[role]) for other in others]


def _render_probe(tokenizer: PreTrainedTokenizerBase, role: str, text: str) -> str:
    """Render a message of a role and a question; "" if the template refuses them."""
    try:
        return render(tokenizer, [(role, text), (USER, _PROBES[USER])], "two messages")
    except InputError:
        return ""


def _write_plain(messages: Messages, template: Template, ending: str) -> str:
    """Write a conversation as the plain templates do."""
    assert template != "chat"
    before, *after = PLAIN[template]
    parts = [
        f" {text}{ending}" if role == ASSISTANT else f"{before}{text}{''.join(after)}"
        for role, text in messages
    ]
    return "".join(parts)


def _unframe(
    text: str, frame: tuple[str, str], opening: str, closing: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text without the characters that frame answers, and where each answer's turn stands in it.

    ``opening`` and ``closing`` are what a turn has around its answer.
    """
    first, last = frame
    clean, answers, place = "", [], 0
    for match in re.finditer(f"{first}([^{first}{last}]*){last}|[{first}{last}]", text):
        clean += text[place : match.start()]
        place = match.end()
        if match[1] is None:
            continue
        start = len(clean) - (len(opening) if clean.endswith(opening) else 0)
        clean += match[1]
        ends_turn = text.startswith(closing, place)
        answers.append((start, len(clean) + (len(closing) if ends_turn else 0)))
    return clean + text[place:], answers
