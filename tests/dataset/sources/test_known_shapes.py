"""Test that the rows of well-known sets are read without a setting: invented samples in their shapes."""

from typing import Any

import pytest

from tasks.dataset.conversation import Messages
from tasks.dataset.question import Question
from tasks.dataset.sources.column_meanings import Columns
from tasks.dataset.sources.known_shapes import SHAPES, recognise
from tests.dataset.sources.test_own_rows import take
from tests.support.data_sets import chat_message
from tests.support.questions.question_rows import draw_pairs

ASKED, GOOD, POOR = "How does one clean a kettle?", "Boil vinegar in it.", "Buy another one."
TALK = [
    chat_message("system", "Be brief."),
    chat_message("user", "Hi"),
    chat_message("assistant", "Hello!"),
    chat_message("user", ASKED),
]
TURNS: Messages = tuple((message["role"], message["content"]) for message in TALK)
WRITTEN = f"System: Be brief.\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {ASKED}"
SHAREGPT = [
    {
        "from": {"user": "human", "assistant": "gpt"}.get(message["role"], message["role"]),
        "value": message["content"],
    }
    for message in TALK
]
GOOD_ANSWER, POOR_ANSWER = chat_message("assistant", GOOD), chat_message("assistant", POOR)
HELPSTEER = {"correctness": 1, "coherence": 4, "complexity": 1, "verbosity": 2}
ULTRAFEEDBACK = [
    {"response": GOOD, "fine-grained_score": 4.5, "overall_score": 1.0, "model": "a"},
    {"response": POOR, "fine-grained_score": 2.0, "overall_score": 10.0, "model": "b"},
]
NECTAR = [{"answer": POOR, "rank": 7.0, "model": "a"}, {"answer": GOOD, "rank": 1.0, "model": "b"}]
HH = f"\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: {ASKED}\n\nAssistant:"
ONE: Messages = ()

# rows, the prompt and its messages, what is better than what, all answers, and columns that nobody reads
CASES: dict[str, tuple[list[dict[str, Any]], str, Messages, bool, set[str]]] = {
    "TRL, explicit prompt": ([{"prompt": ASKED, "chosen": GOOD, "rejected": POOR}], ASKED, ONE, True, set()),
    "TRL, conversations": (
        [{"prompt": TALK, "chosen": [GOOD_ANSWER], "rejected": [POOR_ANSWER]}],
        WRITTEN,
        TURNS,
        True,
        set(),
    ),
    "TRL, implicit prompt": (
        [{"chosen": [*TALK, GOOD_ANSWER], "rejected": [*TALK, POOR_ANSWER]}],
        WRITTEN,
        TURNS,
        True,
        set(),
    ),
    "TRL, prompt and completion": (
        [{"prompt": TALK, "completion": [GOOD_ANSWER]}],
        WRITTEN,
        TURNS,
        False,
        set(),
    ),
    "TRL, messages": ([{"messages": [*TALK, GOOD_ANSWER]}], WRITTEN, TURNS, False, set()),
    "UltraChat": (
        [{"prompt": "Hi", "prompt_id": "f0e3", "messages": [*TALK[1:], GOOD_ANSWER]}],
        WRITTEN.partition("\n\n")[2],
        TURNS[1:],
        False,
        {"prompt_id"},
    ),
    "ShareGPT": (
        [{"id": "x1", "conversations": [*SHAREGPT, {"from": "gpt", "value": GOOD}]}],
        WRITTEN,
        TURNS,
        False,
        {"id"},
    ),
    "Alpaca": ([{"instruction": ASKED, "input": "", "output": GOOD}], ASKED, ONE, False, {"input"}),
    "Alpaca with an input": (
        [{"instruction": ASKED, "input": "It is red.", "output": GOOD, "text": "..."}],
        f"{ASKED}\n\nIt is red.",
        ONE,
        False,
        {"text"},
    ),
    "UltraFeedback": (
        [{"instruction": ASKED, "source": "x", "completions": ULTRAFEEDBACK}],
        ASKED,
        ONE,
        True,
        {"source"},
    ),
    "SHP": (
        [
            {
                "history": ASKED,
                "human_ref_A": POOR,
                "human_ref_B": GOOD,
                "labels": 0,
                "score_A": 2,
                "score_B": 9,
                "domain": "x",
            }
        ],
        ASKED,
        ONE,
        True,
        {"domain"},
    ),
    "HelpSteer2": (
        [
            {"prompt": ASKED, "response": text, "helpfulness": n} | HELPSTEER
            for text, n in ((GOOD, 4), (POOR, 1))
        ],
        ASKED,
        ONE,
        True,
        set(HELPSTEER),
    ),
    "Orca pairs": (
        [{"system": "", "question": ASKED, "chosen": GOOD, "rejected": POOR}],
        ASKED,
        ONE,
        True,
        {"system"},
    ),
    "Orca": (
        [{"id": "x", "system_prompt": "Be brief.", "question": ASKED, "response": GOOD}],
        f"System: Be brief.\n\nHuman: {ASKED}",
        (("system", "Be brief."), ("user", ASKED)),
        False,
        {"id"},
    ),
    "Nectar": (
        [{"prompt": HH, "answers": NECTAR, "turns": 2, "num_responses": 7}],
        WRITTEN.partition("\n\n")[2],
        TURNS[1:],
        True,
        {"turns", "num_responses"},
    ),
    "KTO": (
        [
            {"prompt": ASKED, "completion": text, "label": label}
            for text, label in ((GOOD, True), (POOR, False))
        ],
        ASKED,
        ONE,
        True,
        set(),
    ),
}


def better_and_worse(question: Question) -> list[tuple[str, str]]:
    pairs = draw_pairs(question, max_pairs=10, seed=0)
    return [(question.answers[i].text, question.answers[j].text) for i, j in pairs]


@pytest.mark.parametrize("name", CASES)
def test_a_published_shape_is_read_without_a_setting(name: str) -> None:
    rows, prompt, messages, is_compared, unread = CASES[name]
    (question,), bad, seen = take(*rows)
    assert bad.reasons == {}
    assert (question.prompt, question.messages) == (prompt, messages)
    assert better_and_worse(question) == ([(GOOD, POOR)] if is_compared else [])
    assert {answer.text for answer in question.answers} == ({GOOD, POOR} if is_compared else {GOOD})
    assert set(seen.unread) == {name for name in unread if rows[0][name] != ""}
    assert seen.opposed == {}


def test_a_shape_that_is_recognised_is_noted() -> None:
    rows = CASES["Nectar"][0]
    assert take(*rows)[2].noticed["rows read by the columns of Nectar"] == 1
    assert take(*CASES["KTO"][0])[2].noticed == {}


def test_columns_that_the_settings_name_are_those_that_are_read() -> None:
    row = CASES["Alpaca"][0][0] | {"output2": POOR}
    (question,), _, seen = take(row, prompt="instruction", completion="output2")
    assert [answer.text for answer in question.answers] == [POOR]
    assert seen.noticed == {}
    assert "output" in seen.unread


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_a_prompt_beside_a_conversation_is_a_part_of_it(column: str) -> None:
    talk = [*TALK[1:], GOOD_ANSWER]
    (question,), _, _ = take({"prompt": ASKED, column: talk})
    assert (question.messages, question.answers[0].text) == (TURNS[1:], GOOD)
    questions, bad, _ = take({"prompt": "Another question", column: talk})
    assert questions == []
    assert list(bad.reasons) == ["rows whose conversation does not begin with the prompt (column 'prompt')"]
    both = {"prompt": ASKED, column: talk, "chosen": GOOD, "rejected": POOR}
    assert recognise(both, Columns())[1] == ""


def test_a_shape_needs_all_of_its_columns_and_no_others() -> None:
    for shape in SHAPES:
        filled = {
            name.partition(".")[0]: [{"response": "x", "fine-grained_score": 1, "answer": "x", "rank": 1}]
            for name in shape.required
        }
        assert recognise(filled, Columns())[1] == shape.name
        for name in filled:
            less = {key: value for key, value in filled.items() if key != name}
            assert recognise(less, Columns())[1] != shape.name
        for name in shape.absent:
            assert recognise(filled | {name: "x"}, Columns())[1] != shape.name
