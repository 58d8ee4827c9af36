"""A user's own rows: comparisons, rated answers, and answers to learn from, in any mixture.

A row is {prompt, chosen, rejected}, {prompt, responses, scores} or {prompt, completion}; the columns may be called otherwise.

A text may also be a list of messages {role, content}. Of a conversation that ends in an answer, all before it is the prompt; so a comparison of two
conversations needs no prompt of its own.
"""

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, NamedTuple

from tasks.rlhf.gathered import Gathered
from tasks.rlhf.quarantine import Bad
from tasks.rlhf.rows import Row

SPEAKERS = {"user": "Human", "human": "Human", "assistant": "Assistant", "system": "System"}


class Columns(NamedTuple):
    """What the columns of these meanings are called."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    responses: str = "responses"
    scores: str = "scores"
    completion: str = "completion"


class Unusable(Exception):
    """Why a row cannot be used."""


def gather(rows: Iterable[Row], bad: Bad, columns: Columns, *, site: str, licence: str) -> Gathered:
    found = Gathered(site, licence)
    for place, fields in rows:
        try:
            _take({meaning: fields[name] for meaning, name in columns._asdict().items() if fields.get(name) is not None}, found)
        except Unusable as error:
            bad(place, str(error))
    return found


def _take(values: Mapping[str, Any], found: Gathered) -> None:
    prompt = _prompt(values["prompt"]) if "prompt" in values else ""
    if {"chosen", "rejected"} <= values.keys():
        asked, better = _answer(values["chosen"])
        asked_too, worse = _answer(values["rejected"])
        if asked != asked_too:
            raise Unusable("rows whose sides differ before the last answer")
        if better == worse:
            raise Unusable("rows whose answers are equal")
        found.compare(_asked(prompt, asked), better, worse)
    elif {"responses", "scores"} <= values.keys():
        responses, scores = values["responses"], values["scores"]
        if not (isinstance(responses, list) and isinstance(scores, list) and len(responses) == len(scores) > 0):
            raise Unusable("rows whose responses and scores are not lists of one length")
        if not all(isinstance(score, int | float) and isfinite(score) for score in scores):
            raise Unusable("rows with a score that is no number")
        answers = [_answer(response) for response in responses]  # all are read before one is taken
        for (asked, answer), score in zip(answers, scores, strict=True):
            found.rate(_asked(prompt, asked), answer, float(score))
    elif "completion" in values:
        asked, answer = _answer(values["completion"])
        found.answer(_asked(prompt, asked), answer)
    else:
        raise Unusable("rows without a comparison, rated responses or a completion")


def _asked(prompt: str, asked: str) -> str:
    text = "\n\n".join(filter(None, (prompt, asked)))
    if not text:
        raise Unusable("rows without a prompt")
    return text


def _prompt(value: object) -> str:
    if isinstance(value, str):
        return value.strip()
    return _dialogue(_messages(value))


def _answer(value: object) -> tuple[str, str]:
    """(what was asked before it, if it is a conversation; the answer)."""
    if isinstance(value, str):
        asked, answer = "", value.strip()
    else:
        *before, (role, answer) = _messages(value)
        if role != "assistant":
            raise Unusable("rows with a conversation that does not end in an answer")
        asked = _dialogue(before)
    if not answer:
        raise Unusable("rows with an empty side")
    return asked, answer


def _messages(value: object) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not value:
        raise Unusable("rows with a text that is neither a text nor messages")
    found = [(message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None) for message in value]
    if not all(isinstance(role, str) and role in SPEAKERS and isinstance(content, str) for role, content in found):
        raise Unusable("rows with a message that lacks its role or content")
    return [(str(role), str(content).strip()) for role, content in found]


def _dialogue(messages: list[tuple[str, str]]) -> str:
    """One message is its text; of several, the speakers are named, as in hh-rlhf."""
    if len(messages) == 1:
        return messages[0][1]
    return "\n\n".join(f"{SPEAKERS[role]}: {content}" for role, content in messages)
