"""Apply the rules that decide whether a question is kept. Each rule is a setting and counts what it drops."""

from collections import Counter
from typing import NamedTuple

from tasks.dataset.conversation import Messages, write_out
from tasks.dataset.curation.contamination import Ngrams, overlaps
from tasks.dataset.curation.language import detect_language
from tasks.dataset.curation.personal_data import mask_personal_data
from tasks.dataset.question import Question, drop_unusable_answers, keep_answers


class Rules(NamedTuple):
    """The rules that look at one question at a time."""

    min_answer_chars: int = 1
    max_answer_chars: int = 2**31
    max_prompt_chars: int = 2**31
    personal: str = "keep"  # or "mask", or "drop"
    languages: tuple[str, ...] = ()  # ISO 639-1; empty: any
    evaluation_ngrams: Ngrams | None = None


def apply_rules(
    question: Question, rules: Rules, dropped: Counter[str], masked: Counter[str]
) -> Question | None:
    """Return the question as it is kept, or None.

    ``dropped`` counts by reason; ``masked`` counts personal data that was masked, by kind.
    """
    reason = _exclusion_reason(question, rules)
    if reason:
        dropped[reason] += 1
        dropped[f"answers to {reason}"] += len(question.answers)
        return None
    if rules.personal == "mask":
        question = _mask(question, masked)
    elif rules.personal == "drop":
        question = _drop_personal_answers(question, dropped)
    return drop_unusable_answers(
        question, dropped, min_chars=rules.min_answer_chars, max_chars=rules.max_answer_chars
    )


def _exclusion_reason(question: Question, rules: Rules) -> str:
    """Return the reason why a question is dropped, "" if it is kept."""
    if len(question.prompt) > rules.max_prompt_chars:
        return "questions too long"
    # "": code, or too little text to detect a language
    if rules.languages and detect_language(question.prompt) not in (*rules.languages, ""):
        return "questions in other languages"
    if rules.personal == "drop" and _mask_prompt(question)[2]:
        return "questions with personal data"
    if rules.evaluation_ngrams and overlaps(question.prompt, rules.evaluation_ngrams):
        return "questions of evaluation sets"
    return ""


def _mask(question: Question, masked: Counter[str]) -> Question:
    prompt, messages, counts = _mask_prompt(question)
    answers = []
    for answer in question.answers:
        text, more = mask_personal_data(answer.text)
        counts += more
        answers.append(answer if text is answer.text else answer._replace(text=text))
    masked.update(counts)
    if not counts:
        return question
    return question._replace(prompt=prompt, messages=messages, answers=tuple(answers))


def _mask_prompt(question: Question) -> tuple[str, Messages, Counter[str]]:
    """Return the masked prompt and messages; of a conversation the prompt is the masked messages."""
    if not question.messages:
        prompt, counts = mask_personal_data(question.prompt)
        return prompt, (), counts
    counts = Counter()
    messages = []
    for role, text in question.messages:
        after, found = mask_personal_data(text)
        counts += found
        messages.append((role, after))
    prompt = write_out(messages) if counts else question.prompt
    return prompt, tuple(messages), counts


def _drop_personal_answers(question: Question, dropped: Counter[str]) -> Question:
    kept = [place for place, answer in enumerate(question.answers) if not mask_personal_data(answer.text)[1]]
    dropped["answers with personal data"] += len(question.answers) - len(kept)
    return keep_answers(question, kept)
