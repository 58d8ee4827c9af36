"""What a question has to be like to be kept: every rule is a switch, and counts what it leaves out."""

from collections import Counter
from typing import NamedTuple

from tasks.dataset.curation.contamination import Grams, touches
from tasks.dataset.curation.language import language_of
from tasks.dataset.curation.personal_data import masked
from tasks.dataset.question import Question, only, usable


class Rules(NamedTuple):
    """Those that look at one question at a time."""

    min_answer_chars: int = 1
    max_answer_chars: int = 2**31
    max_prompt_chars: int = 2**31
    personal: str = "keep"  # or "mask", or "drop"
    languages: tuple[str, ...] = ()  # ISO 639-1; none: any
    foreign: Grams | None = None  # word runs of evaluation sets


def admitted(
    question: Question, rules: Rules, dropped: Counter[str], hidden: Counter[str]
) -> Question | None:
    """The question as it is kept, or None. ``dropped`` counts by reason, ``hidden`` what was masked by kind."""
    reason = _fault(question, rules)
    if reason:
        dropped[reason] += 1
        dropped[f"answers to {reason}"] += len(question.answers)
        return None
    if rules.personal == "mask":
        question = _masked(question, hidden)
    elif rules.personal == "drop":
        question = _without_personal(question, dropped)
    return usable(question, dropped, min_chars=rules.min_answer_chars, max_chars=rules.max_answer_chars)


def _fault(question: Question, rules: Rules) -> str:
    if len(question.prompt) > rules.max_prompt_chars:
        return "questions too long"
    if rules.languages and language_of(question.prompt) not in (
        *rules.languages,
        "",
    ):  # "": code, or too little to tell
        return "questions in other languages"
    if rules.personal == "drop" and masked(question.prompt)[1]:
        return "questions with personal data"
    if rules.foreign and touches(question.prompt, rules.foreign):
        return "questions of evaluation sets"
    return ""


def _masked(question: Question, hidden: Counter[str]) -> Question:
    prompt, found = masked(question.prompt)
    answers = []
    for answer in question.answers:
        text, more = masked(answer.text)
        found += more
        answers.append(answer if text is answer.text else answer._replace(text=text))
    hidden.update(found)
    return question._replace(prompt=prompt, answers=tuple(answers)) if found else question


def _without_personal(question: Question, dropped: Counter[str]) -> Question:
    kept = [place for place, answer in enumerate(question.answers) if not masked(answer.text)[1]]
    dropped["answers with personal data"] += len(question.answers) - len(kept)
    return only(question, kept)
