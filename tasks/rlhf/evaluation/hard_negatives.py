"""Make answers that are worse than a real one without people: cut, said twice, or with a wrong name copied.

The reward model can learn from them (`reward.hard_negatives`); the red team measures the last kind.

A name is a word that the answer copies from its question and that few other questions have. No list of words
and no language is assumed, but words must be separated: texts without spaces have no names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches.prompts import Template, decode_answer, encode_answer

T = TypeVar("T")

WORD = re.compile(r"\w(?:\S*\w)?")  # without the signs around it: `*.log` is log, "/etc/hosts." is etc/hosts
SHORTEST_NAME = 3  # characters, unless it is a number
MOST_COMMON = 0.25  # share of the questions that have a word; a more common one is no name
RAREST = 2  # names of a text that may be exchanged, the rarest


class Names(NamedTuple):
    """What a set of questions and answers says about names."""

    num_questions: Mapping[str, int]  # that have a word, by the word
    most: float  # questions that may have a name
    by_shape: Mapping[str, Sequence[str]]  # names that answers copy, sorted, by `_shape`


def first_third(body: list[int]) -> list[int]:
    """Return the first third of an answer, rounded up; ``body`` has no end token."""
    return body[: -(-len(body) // 3)]


def find_names(texts: Iterable[tuple[str, str]]) -> Names:
    """Count the words of questions, and collect the names that their answers copy.

    ``texts`` are (question, answer); their order changes nothing.
    """
    counts: Counter[str] = Counter()
    copied: list[list[str]] = []
    for question, answer in texts:
        words = set(WORD.findall(question))
        counts.update(words)
        copied.append([word for word in words if _can_be_copied(word, answer)])
    most = max(1.0, MOST_COMMON * len(copied))
    names = {name for words in copied for name in _rarest(words, counts, most)}
    by_shape: dict[str, list[str]] = {}
    for name in sorted(names):
        by_shape.setdefault(_shape(name), []).append(name)
    return Names(counts, most, by_shape)


def swap_name(question: str, answer: str, names: Names, *, draw: int) -> str | None:
    """Return the answer with another name, everywhere, in place of one that it copies from its question.

    The other is one that ``names`` has of the same shape and that neither text contains; ``draw`` >= 0
    chooses both. None if there is none.
    """
    words = [word for word in set(WORD.findall(question)) if _can_be_copied(word, answer)]
    for own in _iterate_from(_rarest(words, names.num_questions, names.most), draw):
        for other in _iterate_from(names.by_shape.get(_shape(own), ()), draw // RAREST):
            if not _has_word(question, other) and not _has_word(answer, other):
                return other.join(re.split(rf"(?<!\w){re.escape(own)}(?!\w)", answer))
    return None


def _can_be_copied(word: str, answer: str) -> bool:
    return (len(word) >= SHORTEST_NAME or word.isdecimal()) and _has_word(answer, word)


def _rarest(words: Iterable[str], num_questions: Mapping[str, int], most: float) -> list[str]:
    """Return the names among some words: those that fewest questions have, in a fixed order."""
    rare = [word for word in words if num_questions.get(word, 0) <= most]
    return sorted(rare, key=lambda word: (num_questions.get(word, 0), word))[:RAREST]


def _shape(word: str) -> str:
    """Return the kinds of characters of a word: 0 digits, A capitals, a other letters, and its signs.

    A file is exchanged for a file and a number for a number, which is harder to see than a word for a number.
    """
    kinds = {"0" if c.isdecimal() else "A" if c.isupper() else "a" if c.isalpha() else c for c in word}
    return "".join(sorted(kinds))


def _has_word(text: str, word: str) -> bool:
    """Return whether a word is in a text, with no letter, digit or underscore beside it."""
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not _is_word(text[start - 1 : start]) and not _is_word(text[end : end + 1]):
            return True
        start = text.find(word, start + 1)
    return False


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _iterate_from(values: Sequence[T], start: int) -> Iterator[T]:
    """Yield all values once, beginning at number ``start`` modulo their count."""
    for step in range(len(values)):
        yield values[(start + step) % len(values)]


def decode_texts(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], answer: list[int], *, template: Template
) -> tuple[str, str]:
    """Return a prompt, with the words of its template, and its answer as text."""
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert isinstance(text, str)
    return text, decode_answer(tokenizer, answer, template=template)


def encode_with_wrong_name(
    tokenizer: PreTrainedTokenizerBase,
    texts: tuple[str, str],
    names: Names,
    *,
    draw: int,
    template: Template,
    max_answer_tokens: int,
) -> list[int] | None:
    """Return the ids of `swap_name`'s answer with its end token; None if there is none or it is too long."""
    swapped = swap_name(*texts, names, draw=draw)
    if swapped is None:
        return None
    ids = encode_answer(tokenizer, swapped, template=template, max_tokens=max_answer_tokens + 1)
    return ids if len(ids) <= max_answer_tokens else None
