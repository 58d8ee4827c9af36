"""Apply the rules that decide which questions and answers are kept. Each counts what it drops."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tasks.dataset.columns import MESSAGES, TEXT, Indices, Mask, Questions, replace_column, select
from tasks.dataset.conversation import from_records, to_records, write_out
from tasks.dataset.curation.contamination import Ngrams, overlaps
from tasks.dataset.curation.language import detect_language
from tasks.dataset.curation.personal_data import mask_personal_data
from tasks.dataset.ranking import order_by_preference


class Rules(NamedTuple):
    """The rules that look at one question at a time."""

    min_answer_chars: int = 1
    max_answer_chars: int = 2**31
    max_prompt_chars: int = 2**31
    personal: str = "keep"  # or "mask", or "drop"
    languages: tuple[str, ...] = ()  # ISO 639-1; empty: any
    evaluation_ngrams: Ngrams | None = None


def apply_rules(
    questions: Questions,
    rules: Rules,
    dropped: Counter[str],
    masked: Counter[str],
    *,
    to_text: Callable[[str], str] | None = None,
) -> Questions:
    """Return the questions that are kept, with the answers that are kept.

    ``to_text`` converts the answers' texts, once the rules for questions have left out those not needed.
    ``dropped`` counts by reason; ``masked`` counts personal data that was masked, by kind.
    """
    questions = _exclude(questions, rules, dropped)
    if to_text:
        texts = [to_text(text) for text in questions.answers.column("text").to_pylist()]
        questions = questions._replace(
            answers=replace_column(questions.answers, "text", pa.array(texts, TEXT))
        )
    if rules.personal == "mask":
        questions = questions._replace(
            about=_mask_prompts(questions.about, masked), answers=_mask(questions.answers, "text", masked)
        )
    elif rules.personal == "drop":
        questions = _drop_personal_answers(questions, dropped)
    return drop_unusable_answers(
        questions, dropped, min_chars=rules.min_answer_chars, max_chars=rules.max_answer_chars
    )


def _exclude(questions: Questions, rules: Rules, dropped: Counter[str]) -> Questions:
    """Return the questions whose prompts no rule excludes."""
    reasons = [_exclusion_reason(prompt, rules) for prompt in questions.about.column("prompt").to_pylist()]
    for reason, size in zip(reasons, questions.sizes.tolist(), strict=True):
        if reason:
            dropped[reason] += 1
            dropped[f"answers to {reason}"] += size
    return select(questions, np.array([not reason for reason in reasons], dtype=bool))


def _exclusion_reason(prompt: str, rules: Rules) -> str:
    """Return the reason why a question is dropped, "" if it is kept."""
    if len(prompt) > rules.max_prompt_chars:
        return "questions too long"
    # "": code, or too little text to detect a language
    if rules.languages and detect_language(prompt) not in (*rules.languages, ""):
        return "questions in other languages"
    if rules.personal == "drop" and mask_personal_data(prompt)[1]:
        return "questions with personal data"
    if rules.evaluation_ngrams and overlaps(prompt, rules.evaluation_ngrams):
        return "questions of evaluation sets"
    return ""


def _mask(batch: pa.RecordBatch, column: str, masked: Counter[str]) -> pa.RecordBatch:
    texts = []
    for text in batch.column(column).to_pylist():
        clean, counts = mask_personal_data(text)
        texts.append(clean)
        masked.update(counts)
    return replace_column(batch, column, pa.array(texts, TEXT))


def _mask_prompts(about: pa.RecordBatch, masked: Counter[str]) -> pa.RecordBatch:
    """Return questions with masked prompts; of a conversation the prompt is the masked messages."""
    chats = pc.list_value_length(about.column("messages")).to_numpy(zero_copy_only=False) > 0
    if not chats.any():
        return _mask(about, "prompt", masked)
    prompts, records = about.column("prompt").to_pylist(), about.column("messages").to_pylist()
    for row, is_chat in enumerate(chats.tolist()):
        messages = from_records(records[row]) if is_chat else (("", prompts[row]),)
        masks = [mask_personal_data(text) for _, text in messages]
        found = sum((counts for _, counts in masks), Counter[str]())
        if found:
            masked.update(found)
            after = tuple((role, text) for (role, _), (text, _) in zip(messages, masks, strict=True))
            prompts[row] = write_out(after) if is_chat else after[0][1]
            records[row] = to_records(after) if is_chat else []
    about = replace_column(about, "prompt", pa.array(prompts, TEXT))
    return replace_column(about, "messages", pa.array(records, MESSAGES))


def _drop_personal_answers(questions: Questions, dropped: Counter[str]) -> Questions:
    texts = questions.answers.column("text").to_pylist()
    kept = np.array([not mask_personal_data(text)[1] for text in texts], dtype=bool)
    dropped["answers with personal data"] += int((~kept).sum())
    return select(questions, np.ones(len(questions.compared), dtype=bool), kept)


def drop_unusable_answers(
    questions: Questions, dropped: Counter[str], *, min_chars: int = 1, max_chars: int = 2**31
) -> Questions:
    """Return the questions without answers of unfitting length and, of equal texts, all but the best.

    Questions without a text or without such an answer are left out. ``dropped`` counts the reasons.
    """
    has_text, sizes = _count_chars(questions.about, "prompt") > 0, questions.sizes
    dropped["questions without text"] += int((~has_text).sum())
    dropped["answers to questions without text"] += int(sizes[~has_text].sum())
    chars = _count_chars(questions.answers, "text")
    kept = np.repeat(has_text, sizes)
    for reason, is_faulty in (
        ("answers without text", chars == 0),
        ("answers too short", chars < min_chars),
        ("answers too long", chars > max_chars),
        ("answers equal to another of the question", ~_is_first_of_equal(questions)),
    ):
        dropped[reason] += int((kept & is_faulty).sum())
        kept &= ~is_faulty
    has_answers = np.bincount(questions.owners[kept], minlength=len(sizes)) > 0
    dropped["questions without usable answers"] += int((has_text & ~has_answers & (sizes > 0)).sum())
    dropped["questions without answers"] += int((has_text & (sizes == 0)).sum())
    return select(questions, has_answers, kept)


def _count_chars(batch: pa.RecordBatch, column: str) -> NDArray[np.int64]:
    chars: NDArray[np.int64] = pc.utf8_length(batch.column(column)).to_numpy()
    return chars


def _is_first_of_equal(questions: Questions) -> Mask:
    """Return whether an answer is the best of its question's answers with equal texts, [m]."""
    codes = questions.answers.column("text").dictionary_encode().indices.to_numpy().astype(np.int64)
    order: Indices = order_by_preference(questions)
    groups = questions.owners * (codes.max(initial=0) + 1) + codes
    _, first = np.unique(groups[order], return_index=True)
    is_first = np.zeros(len(order), dtype=bool)
    is_first[order[first]] = True
    return is_first
