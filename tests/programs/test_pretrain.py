"""Test the documents that the built-in base is trained on."""

import pytest

from tasks.programs import pretrain
from tests.support import tiny

ROW = {"prompt": "How do I list files?\n\nI use bash.", "answer": "Use ls.", "score": 3.0}


def parts(*, answers_only: bool) -> tuple[str, str]:
    """Return the text of a document that is only read, and the text that is predicted."""
    tokenizer = tiny.tokenizer()
    (document,) = pretrain._documents(tokenizer, [ROW], answers_only=answers_only)
    read, predicted = (
        [i for i, c in zip(document.ids, document.target, strict=True) if c is wanted]
        for wanted in (False, True)
    )
    return tokenizer.decode(read), tokenizer.decode(predicted)


def test_a_page_is_question_answer_end_and_score() -> None:
    assert (
        "".join(parts(answers_only=True))
        == "Question: How do I list files?\n\nI use bash.\n\nAnswer: Use ls.<eos> Score: 3"
    )


def test_only_the_answer_its_end_and_its_score_are_predicted() -> None:
    assert parts(answers_only=True)[1] == " Use ls.<eos> Score: 3"


def test_or_everything() -> None:
    assert parts(answers_only=False)[0] == ""


@pytest.mark.parametrize("text", ["<eos>", "<pad> x"])
def test_a_post_that_spells_a_special_token_does_not_end_its_page(text: str) -> None:
    (document,) = pretrain._documents(
        tiny.tokenizer(), [{**ROW, "prompt": text, "answer": text}], answers_only=True
    )
    assert document.ids.count(tiny.EOS) == 1
    assert tiny.PAD not in document.ids
