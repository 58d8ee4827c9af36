"""Test answers made to be worse: which names they exchange, by hand, and what always holds of them."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.rlhf.batches.prompts import encode_answer, encode_prompt
from tasks.rlhf.evaluation.hard_negatives import (
    WORD,
    Names,
    decode_texts,
    encode_with_wrong_name,
    find_names,
    first_third,
    swap_name,
)
from tests.support import tiny

TEXTS = [
    ("How do I copy notes.txt to /backup?", "Use `cp notes.txt /backup`."),
    ("How do I show 20 lines of data.csv?", "Use `head -n 20 data.csv`."),
    ("How do I show 5 lines of Paris?", "Use `head -n 5 Paris`."),
    ("How do I copy Berlin to /mnt/usb?", "`cp Berlin /mnt/usb` does it."),
    ("How do I stop?", "Press the key."),
]
NAMES = find_names(TEXTS)
TOKENIZER = tiny.tokenizer()


def swaps(question: str, answer: str, names: Names = NAMES, *, draws: int = 40) -> set[str | None]:
    return {swap_name(question, answer, names, draw=draw) for draw in range(draws)}


def test_names_by_hand() -> None:
    assert NAMES.by_shape == {
        ".a": ["data.csv", "notes.txt"],
        "/a": ["mnt/usb"],
        "0": ["20", "5"],
        "Aa": ["Berlin", "Paris"],
        "a": ["backup"],
    }
    assert NAMES.num_questions["copy"] == 2
    assert NAMES.num_questions["How"] == 5
    assert NAMES.most == 1.25


def test_names_are_exchanged_for_names_of_their_shape_by_hand() -> None:
    assert swaps(*TEXTS[1]) == {"Use `head -n 5 data.csv`.", "Use `head -n 20 notes.txt`."}
    assert swaps(*TEXTS[2]) == {"Use `head -n 20 Paris`.", "Use `head -n 5 Berlin`."}
    assert swaps(*TEXTS[3]) == {"`cp Paris /mnt/usb` does it."}  # no other folder is named in two parts
    assert swaps(*TEXTS[4]) == {None}  # nothing is copied


def test_the_draw_chooses_the_name_and_its_replacement() -> None:
    names = Names({"ab1": 1, "ab2": 1}, 1.0, {"0a": ["ab1", "ab2", "ab3", "ab4"]})
    texts = ("ab1 and ab2?", "ab2, then ab1.")
    assert [swap_name(*texts, names, draw=draw) for draw in range(8)] == [
        "ab2, then ab3.",  # ab1 is exchanged; 0 // 2: from ab1 on, the first that is in no text
        "ab3, then ab1.",
        "ab2, then ab3.",  # from ab2 on
        "ab3, then ab1.",
        "ab2, then ab3.",
        "ab3, then ab1.",
        "ab2, then ab4.",  # 6 // 2: from ab4 on
        "ab4, then ab1.",
    ]


def test_a_name_is_exchanged_everywhere_and_only_as_a_whole_word() -> None:
    names = Names({"log": 1}, 1.0, {"a": ["log", "py"]})
    found = swap_name("all .log files", "*.log, catalog, a.log.log log_x x/log", names, draw=0)
    assert found == "*.py, catalog, a.py.py log_x x/py"
    assert swap_name("all .log files", "catalog log_x", names, draw=0) is None  # it copies no word
    assert find_names([("all .log files", "catalog log_x")]).by_shape == {}


def test_common_and_short_words_are_no_names() -> None:
    texts = [(f"do it with file{n} now", f"it with file{n} now") for n in range(8)]
    assert find_names(texts).by_shape == {"0a": [f"file{n}" for n in range(8)]}
    assert find_names([("a be sea", "a be sea")]).by_shape == {"a": ["sea"]}
    assert find_names([("2 be", "2 be")]).by_shape == {"0": ["2"]}
    assert find_names([]).by_shape == {}


def test_signs_of_a_pattern_are_characters_like_others() -> None:
    names = Names({"a+b": 1}, 1.0, {"+a": ["a+b", r"x+y"], "a": []})
    assert swap_name("what is a+b?", r"a+b is \1", names, draw=0) == r"x+y is \1"


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_texts_changes_nothing(seed: int) -> None:
    shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
    assert find_names(shuffled) == NAMES


words = st.sampled_from("log py txt notes.txt data.csv /etc /var/log 5 20 Paris Rome the of".split())
sentences = st.lists(words, max_size=6).map(" ".join)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(sentences, sentences), min_size=1, max_size=8), st.integers(0, 2**63 - 1))
def test_a_swap_exchanges_a_copied_word_for_one_that_the_question_does_not_have(
    texts: list[tuple[str, str]], draw: int
) -> None:
    names = find_names(texts)
    for question, answer in texts:
        swapped = swap_name(question, answer, names, draw=draw)
        if swapped is None:
            continue
        parts = {*re.findall(r"\w+", answer)}, {*re.findall(r"\w+", swapped)}
        gone, new = (parts[0] - parts[1], parts[1] - parts[0])
        assert swapped != answer
        assert new or gone  # of names in several parts some may be elsewhere too
        assert gone <= {*re.findall(r"\w+", question)}
        added = {*WORD.findall(swapped)} - {*WORD.findall(answer)}
        assert not added & {*WORD.findall(question)}


def test_a_third_by_hand() -> None:
    assert first_third([1, 2, 3, 4, 5, 6, 7]) == [1, 2, 3]
    assert (first_third([1]), first_third([])) == ([1], [])


@pytest.mark.parametrize("most", [40, 12, 3])
def test_the_texts_of_tokens_are_exchanged_and_too_long_ones_left_out(most: int) -> None:
    """The names of the tiny data are common words: here every one is in one question alone."""
    prompts = [
        encode_prompt(TOKENIZER, text, template="question-answer", max_tokens=60)
        for text in ("copy files", "print disks")
    ]
    answers = [
        encode_answer(TOKENIZER, text, template="question-answer", max_tokens=60)
        for text in ("Use copy", "Use disks")
    ]
    texts = [
        decode_texts(TOKENIZER, prompt, answer, template="question-answer")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    assert texts[0] == ("Question: copy files\n\nAnswer:", "Use copy")
    found = encode_with_wrong_name(
        TOKENIZER, texts[0], find_names(texts), draw=0, template="question-answer", max_answer_tokens=most
    )
    wanted = encode_answer(TOKENIZER, "Use disks", template="question-answer", max_tokens=60)
    assert found == (wanted if len(wanted) <= most else None)
    assert (found is None) == (most == 3)
