"""Test the documents that the built-in base is trained on."""

import pytest

from tasks.dataset.conversation import to_records, write_out
from tasks.programs import pretrain
from tasks.rlhf.batches import conversations
from tasks.rlhf.batches.prompts import encode_answer
from tests.support import tiny

ROW: pretrain.Row = {"prompt": "How do I list files?\n\nI use bash.", "answer": "Use ls.", "score": 3.0}


TALK = (("user", "List <eos> files"), ("assistant", "Use ls."), ("user", "And disks?"))
CHAT: pretrain.Row = {
    "prompt": write_out(TALK), "answer": "Use df.", "score": 1.0, "messages": to_records(TALK),
}  # fmt: skip


def parts(row: pretrain.Row = ROW, *, answers_only: bool) -> tuple[str, str]:
    """Return the text of a document that is only read, and the text that is predicted."""
    tokenizer = tiny.tokenizer()
    (document,) = pretrain._documents(tokenizer, [row], answers_only=answers_only)
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


def test_a_conversation_is_a_page_of_turns_as_sft_writes_them() -> None:
    tokenizer = tiny.tokenizer()
    plain, chat, _ = pretrain._documents(tokenizer, [ROW, CHAT, ROW], answers_only=True)
    prompt = conversations.encode_messages(tokenizer, TALK, "question-answer")
    answer = encode_answer(tokenizer, "Use df.", template="question-answer", max_tokens=99)
    assert chat.ids[: len(prompt) + len(answer)] == prompt + answer
    assert tokenizer.decode(chat.ids) == (
        "Question: List <eos> files\n\nAnswer: Use ls.<eos>"
        "Question: And disks?\n\nAnswer: Use df.<eos> Score: 1"
    )
    assert chat.ids.count(tiny.EOS) == 2
    assert [plain] == pretrain._documents(tokenizer, [ROW], answers_only=True)


def test_every_answer_of_a_conversation_is_predicted() -> None:
    assert parts(CHAT, answers_only=True)[1] == " Use ls.<eos> Use df.<eos> Score: 1"
    assert parts(CHAT, answers_only=False)[0] == ""


def test_the_tokenizer_learns_the_turns_of_a_conversation() -> None:
    assert pretrain._texts(CHAT) == [
        "Question: List <eos> files\n\nAnswer:", " Use ls.", "Question: And disks?\n\nAnswer:", " Use df.",
        " Score: 1",
    ]  # fmt: skip
    assert pretrain._texts(ROW | {"messages": []}) == [
        "Question: How do I list files?\n\nI use bash.\n\nAnswer:", " Use ls.", " Score: 3"
    ]  # fmt: skip
