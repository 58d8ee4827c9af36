"""Test a user's own rows: synonymous columns, columns that swap the sides, nested columns, unused columns."""

import json
import time
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from flows.setting_values import read_argument
from tasks.artifacts import corpus, hub
from tasks.config.sections.sources import HhRlhf, OwnRows
from tasks.dataset.question import Question
from tasks.dataset.readers.quarantine import Quarantine, UnusableRow
from tasks.dataset.sources import own_rows, stack_exchange_sets
from tasks.dataset.sources.column_meanings import (
    Columns,
    find_twin_scores,
    find_value,
    is_first_better,
    is_good_label,
    split_words,
)
from tasks.dataset.sources.grouping import AnswerGroups
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.dataset.splits import is_test
from tasks.system.errors import InputError
from tests.support.data_sets import as_rows, chat_message, questions_of, read_table, run_data_program
from tests.support.questions.question_rows import draw_pairs

ASKED = "How does one clean a kettle?"
U, A, S = (lambda text, role=role: chat_message(role, text) for role in ("user", "assistant", "system"))


def take(
    *fields: dict[str, Any], file: str = "f.jsonl", **columns: Any
) -> tuple[list[Question], Quarantine, RowWarnings]:
    bad, seen = Quarantine(), RowWarnings.empty()
    found = own_rows.group_rows(
        as_rows(*fields, file=file), bad, Columns(**columns), site="mine", licence="", warnings=seen
    )
    return questions_of(found), bad, seen


def pairs_in(question: Question) -> set[tuple[str, str]]:
    texts = [answer.text for answer in question.answers]
    return {(texts[i], texts[j]) for i, j in draw_pairs(question, max_pairs=10, seed=0)}


# ------------------------------------------------------------------------ columns that say the same

HELLO = [U("hi"), A("hello")]


@pytest.mark.parametrize(
    ("prompt", "before", "expected"),
    [
        (ASKED, [U(ASKED)], ASKED),
        (f" {ASKED}\n\n ", [U(ASKED)], ASKED),
        (ASKED.replace(" ", "\n"), [U(ASKED)], ASKED),
        ([U(ASKED)], [U(ASKED)], ASKED),
        (ASKED, [S("Be brief."), U(ASKED)], f"System: Be brief.\n\nHuman: {ASKED}"),
        ([S("Be brief."), U(ASKED)], [U(ASKED)], f"System: Be brief.\n\nHuman: {ASKED}"),
        ([S("Be brief."), U(ASKED)], [S("Be  brief."), U(ASKED)], f"System: Be brief.\n\nHuman: {ASKED}"),
        ([S("Be brief.")], [U(ASKED)], f"System: Be brief.\n\nHuman: {ASKED}"),
        ("hi", [*HELLO, U(ASKED)], f"Human: hi\n\nAssistant: hello\n\nHuman: {ASKED}"),
        (ASKED, [*HELLO, U(ASKED)], f"Human: hi\n\nAssistant: hello\n\nHuman: {ASKED}"),
        ([*HELLO, U(ASKED)], [U(ASKED)], f"Human: hi\n\nAssistant: hello\n\nHuman: {ASKED}"),
        ([*HELLO, U(ASKED)], [*HELLO, U(ASKED)], f"Human: hi\n\nAssistant: hello\n\nHuman: {ASKED}"),
        (
            f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {ASKED}\n\nAssistant:",
            [*HELLO, U(ASKED)],
            f"Human: hi\n\nAssistant: hello\n\nHuman: {ASKED}",
        ),
        (json.dumps([U(ASKED)]), [U(ASKED)], ASKED),
        ([{"from": "human", "value": ASKED}], [U(ASKED)], ASKED),
        (None, [U(ASKED)], ASKED),
        ("something else entirely", [U(ASKED)], None),
        (ASKED, [U(ASKED + " And a pan?")], None),
        ([S("Be brief."), U(ASKED)], [S("Be long."), U(ASKED)], None),
        ([*HELLO], [U(ASKED)], None),
    ],
)
@pytest.mark.parametrize("shape", ["comparison", "completion", "responses"])
def test_a_prompt_that_the_conversation_has_too_is_taken_once(
    prompt: Any, before: list[Any], expected: str | None, shape: str
) -> None:
    fields: dict[str, Any] = {"prompt": prompt}
    good, poor = [*before, A("good")], [*before, A("poor")]
    fields |= {
        "comparison": {"chosen": good, "rejected": poor},
        "completion": {"completion": good},
        "responses": {"responses": [good, poor], "scores": [2, 1]},
    }[shape]
    questions, bad, _ = take(fields)
    if expected is None:
        assert (questions, bad.reasons) == (
            [],
            {"rows whose conversation does not begin with the prompt (column 'prompt')": 1},
        )
        return
    assert bad.reasons == {}
    assert [question.prompt for question in questions] == [expected]
    assert {answer.text for answer in questions[0].answers} == (
        {"good"} if shape == "completion" else {"good", "poor"}
    )


def test_a_prompt_that_all_answers_begin_with_is_taken_off_them() -> None:
    (question,), _, seen = take(
        {"prompt": ASKED, "chosen": f"{ASKED}\nWith vinegar.", "rejected": f"{ASKED} No."}
    )
    assert pairs_in(question) == {("With vinegar.", "No.")}
    assert seen.noticed == {"rows whose answers begin with the whole prompt, which is taken off them": 1}
    (question,), _, _ = take({"prompt": ASKED, "chosen": f"{ASKED}\nWith vinegar.", "rejected": "No."})
    assert pairs_in(question) == {(f"{ASKED}\nWith vinegar.", "No.")}, "one answer may quote its question"
    (question,), _, _ = take({"prompt": ASKED, "responses": [f"{ASKED} Yes.", "No."], "scores": [2, 1]})
    assert pairs_in(question) == {(f"{ASKED} Yes.", "No.")}
    (question,), _, _ = take({"prompt": ASKED, "completion": f"{ASKED} Yes."})
    assert question.answers[0].text == "Yes."
    (question,), _, _ = take(
        {"prompt": "Describe the kettle of Ann", "completion": "Describe the kettle of Anna: it is green."}
    )
    assert question.answers[0].text.startswith("Describe"), "the prompt ends within a word"
    assert list(
        take({"prompt": ASKED, "chosen": f"{ASKED} Yes.", "rejected": f"{ASKED}  Yes."})[1].reasons
    ) == ["rows whose answers are equal (columns 'chosen' and 'rejected')"]


# ---------------------------------------------------------- columns that turn a row's meaning round

KTO = {"prompt": ASKED, "completion": "Do not."}


@pytest.mark.parametrize(
    ("label", "good"),
    [
        (True, True),
        (1, True),
        ("true", True),
        ("Good", True),
        ("chosen", True),
        (1.0, True),
        (Decimal(1), True),
    ],
)
@pytest.mark.parametrize("column", ["label", "thumbs"])
def test_a_label_says_whether_a_completion_is_good(label: Any, good: bool, column: str) -> None:
    opposite = (
        {"true": "False", "Good": "bad", "chosen": "rejected"}[label]
        if isinstance(label, str)
        else type(label)(0)
    )
    named = {} if column == "label" else {"label": column}
    rows = [
        {"prompt": ASKED, "completion": "With vinegar.", column: label},
        KTO | {column: opposite},
        {"prompt": "q", "completion": "x", column: opposite},
    ]
    bad, dropped = Quarantine(), Counter[str]()
    (question,) = own_rows.group_rows(as_rows(*rows), bad, Columns(**named), site="", licence="").questions(
        dropped
    )
    assert bad.reasons == {}
    assert pairs_in(question) == {("With vinegar.", "Do not.")}
    assert dropped == {
        "comparisons that contradict each other": 0,
        "questions whose every answer is labelled bad": 1,
    }


@pytest.mark.parametrize("label", [None, "", "NULL", float("nan"), "maybe", 7, [True], {"a": 1}])
def test_a_label_that_says_nothing_leaves_the_row_out(label: Any) -> None:
    questions, bad, _ = take(KTO | {"label": label})
    assert questions == []
    assert [
        "(column 'label'; list it in source.ignored if it is none)" in reason for reason in bad.reasons
    ] == [True]
    (question,), bad, seen = take(KTO | {"label": label}, ignored=("label",))
    assert (len(question.answers), bad.reasons, seen.unread) == (1, {}, {})


def test_labels_beside_comparisons_and_scores() -> None:
    found = AnswerGroups("", "")
    for good in (True, False):
        found.add_label("torn", "a", good)
    found.add_label("torn", "b", False)
    found.add_comparison("compared", "a", "b")
    found.add_label("compared", "b", True)
    found.add_label("compared", "c", False)
    found.add_rating("rated", "a", 3)
    found.add_rating("rated", "b", -4)
    found.add_answer("rated", "c")
    found.add_answer("learnt", "a")
    found.add_label("learnt", "b", False)
    dropped: Counter[str] = Counter()
    questions = {question.prompt: question for question in found.questions(dropped)}
    assert {name: pairs_in(question) for name, question in questions.items()} == {
        name: {("a", "b")} for name in ("compared", "rated", "learnt")
    }
    assert +dropped == {
        "questions whose every answer is labelled bad": 1,
        "answers labelled bad to a question whose others are compared": 1,
        "answers without a score to a question whose others have one": 1,
    }


@pytest.mark.parametrize(
    "column",
    ["label", "labels", "winner", "better_response_id", "overall_preference", "is_swapped", "preferredSide"],
)
@pytest.mark.parametrize("value", [0, True, "B", 0.5])
def test_a_comparison_with_a_label_that_nothing_reads_is_refused(column: str, value: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", column: value}
    questions, bad, _ = take(row)
    assert questions == []
    assert list(bad.reasons) == [
        (
            f"rows whose column '{column}' may turn their meaning round (name it in source.scores or "
            "source.label, or in source.ignored if it does not)"
        )
    ]
    assert take(row, ignored=(column,))[1].reasons == {}
    assert take(row | {column: None})[1].reasons == {}, "a column that holds nothing decides nothing"


@pytest.mark.parametrize(
    "column",
    [
        "label_text",
        "score",
        "rating",
        "helpfulness",
        "is_correct",
        "reward",
        "toxicity",
        "thumbs_up",
        "chosen",
        "stars",
    ],
)
def test_a_completion_with_a_judgement_that_nothing_reads_is_refused(column: str) -> None:
    _, bad, _ = take({"prompt": "q", "completion": "a", column: 1})
    assert [f"'{column}' may turn" in reason for reason in bad.reasons] == [True]


@pytest.mark.parametrize(
    "column",
    [
        "id",
        "source",
        "label",
        "model",
        "category",
        "created",
        "restored",
        "underscored",
        "tokens",
        "prompt_id",
    ],
)
def test_other_columns_are_only_counted(column: str) -> None:
    row = {"prompt": "q", "completion": "a", column: "true" if column == "label" else "x"}
    _, bad, seen = take(row, {"prompt": "r", "completion": "a", column: None if column != "label" else True})
    assert bad.reasons == {}
    assert seen.unread == ({} if column == "label" else {column: 1})


@pytest.mark.parametrize(
    "column", ["system_prompt", "history", "instruction", "persona", "chat_history", "SystemPrompt"]
)
@pytest.mark.parametrize("value", ["You are a careful gardener.", [["hi", "hello"]]])
def test_a_text_that_may_belong_to_the_prompt_is_refused_until_it_is_named(column: str, value: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", column: value}
    assert [f"'{column}' may belong to their prompt" in reason for reason in take(row)[1].reasons] == [True]
    assert take(row | {column: ""})[1].reasons == {}
    assert take(row | {column: "q"})[1].reasons == {}, "it says what is read already"
    if isinstance(value, str):
        (question,), _, seen = take(row, system=column)
        assert question.prompt == "System: You are a careful gardener.\n\nHuman: q"
        assert seen.added == {column: 1}


@pytest.mark.parametrize(
    ("fields", "columns", "prompt"),
    [
        ({"system": "Be brief.", "prompt": "q"}, {}, "System: Be brief.\n\nHuman: q"),
        ({"system": "", "prompt": "q"}, {}, "q"),
        ({"system": "NULL", "prompt": "q"}, {}, "q"),
        ({"system": "Be brief.", "prompt": [S("Be brief."), U("q")]}, {}, "System: Be brief.\n\nHuman: q"),
        (
            {"instruction": "Translate.", "input": "Guten Tag"},
            {"prompt": "instruction"},
            "Translate.\n\nGuten Tag",
        ),
        ({"instruction": "Translate.", "input": ""}, {"prompt": "instruction"}, "Translate."),
        ({"question": "Who?", "context": "Ann did it."}, {"prompt": "question"}, "Who?\n\nAnn did it."),
        (
            {"prompt": "It was Ann who did it. Who?", "context": "It was Ann who did it."},
            {},
            "It was Ann who did it. Who?",
        ),
        (
            {"instruction": "Concatenate it with dog.", "input": "cat"},
            {"prompt": "instruction"},
            "Concatenate it with dog.\n\ncat",
        ),
        ({"input": "q"}, {"prompt": "input"}, "q"),
        (
            {"context": [U("hi"), A("hello"), U("q")]},
            {"prompt": "context"},
            "Human: hi\n\nAssistant: hello\n\nHuman: q",
        ),
        ({"system": "Be brief.", "prompt": "q", "input": "x"}, {}, "System: Be brief.\n\nHuman: q\n\nx"),
    ],
)
def test_known_columns_are_part_of_the_prompt(
    fields: dict[str, Any], columns: dict[str, Any], prompt: str
) -> None:
    (question,), bad, seen = take(fields | {"output": "a"}, completion="output", **columns)
    assert (question.prompt, bad.reasons, seen.unread) == (prompt, {}, {})


def test_all_answers_of_a_row_have_the_same_prompt() -> None:
    fields = {
        "system": "Be brief.",
        "prompt": "q",
        "input": "x",
        "responses": ["a", "b", "c"],
        "scores": [3, 2, 1],
    }
    (question,), _, seen = take(fields)
    assert (question.prompt, len(question.answers)) == ("System: Be brief.\n\nHuman: q\n\nx", 3)
    assert seen.added == {"input": 1, "system": 1}


def test_two_different_system_messages_are_refused() -> None:
    assert list(
        take({"system": "Be long.", "prompt": [S("Be brief."), U("q")], "completion": "a"})[1].reasons
    ) == ["rows with two system messages (column 'system')"]


# ----------------------------------------------------------------------------------------- messages

CHAT = [U("q"), A("a")]


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        json.dumps(CHAT),
        f"  {json.dumps(CHAT, indent=2)}\n",
        {"messages": CHAT},
        json.dumps({"conversations": CHAT}),
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [
            {"role": "User", "content": "q", "value": None},
            {"role": " ASSISTANT", "content": "a", "from": None},
        ],
        [U("q"), {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
    ],
)
def test_conversations_of_every_form(value: Any) -> None:
    (question,), bad, _ = take({"completion": value})
    assert (question.prompt, [answer.text for answer in question.answers], bad.reasons) == ("q", ["a"], {})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (str(CHAT), "messages as text that is no JSON"),
        (json.dumps(CHAT)[:-3], "messages as text that is no JSON"),
        ('[{"role": ' + "[" * 100_000, "messages as text that is no JSON"),
        ('[{"role": "user", "role": "assistant", "content": "x"}]', "names 'role' twice"),
        ({"text": "x"}, "lacks its role or content"),
        (["x", "y"], "neither a text nor messages"),
        ([], "neither a text nor messages"),
        (7, "neither a text nor messages"),
        (b"x", "neither a text nor messages"),
        ([U("q"), {"role": "tool", "content": "x"}, A("a")], "neither user, assistant nor system but 'tool'"),
        ([U("q"), {"role": "assistant", "content": None, "tool_calls": [{}]}], "lacks its role or content"),
        ([U("q"), {"role": "assistant", "content": [{"type": "image_url"}]}], "lacks its role or content"),
        ([U("q")], "does not end in an answer"),
        ([U("q"), A(" ")], "an empty side"),
    ],
)
@pytest.mark.parametrize("name", ["completion", "reply"])
def test_what_is_no_conversation_is_refused_with_its_column(value: Any, words: str, name: str) -> None:
    questions, bad, _ = take({"prompt": "q", name: value}, completion=name)
    ((reason, _),) = bad.reasons.items()
    assert questions == []
    assert words in reason
    assert f"(column '{name}')" in reason


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        "[link](https://x)",
        '{"a": 1}',
        "[]",
        "{}",
        '[{"name": "role"}]',
        'A message is {"role": "user"}',
    ],
)
def test_an_answer_in_brackets_is_a_text(text: str) -> None:
    (question,), _, _ = take({"prompt": "q", "completion": text})
    assert question.answers[0].text == text


# ----------------------------------------------------------------- nested columns, numbers, nothing


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        (
            {"prompt": "q", "chosen": {"content": "a", "n": 1}, "rejected": {"content": "b"}},
            {"chosen": "chosen.content", "rejected": "rejected.content"},
        ),
        ({"prompt": "q", "chosen": A("a"), "rejected": A("b")}, {}),
        (
            {"a": {"b": {"q": "q"}}, "good.text": "a", "x": {"y": "b"}},
            {"prompt": "a.b.q", "chosen": "good.text", "rejected": "x.y"},
        ),
        (
            {"prompt": "q", "completions": [{"text": "a", "rating": 4}, {"text": "b", "rating": "3.5"}]},
            {"responses": "completions.text", "scores": "completions.rating"},
        ),
        (
            {"prompt": "q", "completions": {"text": ["a", "b"], "rating": [4, 3]}},
            {"responses": "completions.text", "scores": "completions.rating"},
        ),
        ({"prompt": "q", "responses": '["a", "b"]', "scores": "[2, 1]"}, {}),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [Decimal("1.50"), Decimal("0.50")]}, {}),
        (
            {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]},
            {"scores": "rank", "scores_are_ranks": True},
        ),
    ],
)
def test_nested_and_odd_columns(fields: dict[str, Any], columns: dict[str, Any]) -> None:
    (question,), bad, seen = take(fields, **columns)
    assert (question.prompt, pairs_in(question), bad.reasons, seen.unread) == ("q", {("a", "b")}, {}, {})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "q", "chosen": "NULL", "rejected": "x"}, "(missing or empty: 'chosen')"),
        ({"prompt": "q", "chosen": "x"}, "(missing or empty: 'rejected')"),
        ({"prompt": "q", "responses": ["x"]}, "(missing or empty: 'scores')"),
        ({"prompt": "q", "completion": float("nan")}, "(missing or empty: 'completion')"),
        ({"prompt": "q"}, "(none of 'chosen', 'rejected', 'responses', 'scores', 'completion')"),
        ({"prompt": "\\N", "completion": "x"}, "without a prompt (column 'prompt')"),
        ({"prompt": " ", "completion": "x"}, "without a prompt (column 'prompt')"),
        ({"prompt": "q", "completion": " "}, "an empty side (column 'completion')"),
        ({"prompt": "q", "responses": ["a", None], "scores": [1, 2]}, "an empty side (column 'responses')"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, None]}, "no number (column 'scores')"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "N/A"]}, "no number (column 'scores')"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 10**400]}, "no number (column 'scores')"),
        (
            {"prompt": "q", "responses": ["a", "b"], "scores": [1, Decimal("sNaN")]},
            "no number (column 'scores')",
        ),
        (
            {"prompt": "q", "responses": ["a"], "scores": [1, 2]},
            "not lists of one length (columns 'responses' and 'scores')",
        ),
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "equal (columns 'chosen' and 'rejected')"),
        ({"prompt": "q", "context": [U("x")], "completion": "x"}, "a text is wanted (column 'context')"),
    ],
)
def test_refusals_name_the_column(fields: dict[str, Any], words: str) -> None:
    questions, bad, _ = take(fields)
    assert questions == []
    assert [words in reason for reason in bad.reasons] == [True], bad.reasons


def test_half_characters_in_text_that_is_json_become_replacements() -> None:
    (question,), _, _ = take({"prompt": "q", "responses": '["a\\ud800", "b"]', "scores": "[2, 1]"})
    assert pairs_in(question) == {("a\ufffd", "b")}
    (question,), _, _ = take(
        {"completion": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a\\ud800"}]'}
    )
    assert question.answers[0].text == "a\ufffd"


def test_ranks_are_no_scores_until_their_user_says_so() -> None:
    fields = {"prompt": "q", "responses": ["a", "b"], "rank": [1, 2]}
    assert [
        ("column 'rank'; say so in source.scores_are_ranks" in reason)
        for reason in take(fields, scores="rank")[1].reasons
    ] == [True]
    assert pairs_in(take(fields, scores="rank", scores_are_ranks=False)[0][0]) == {("b", "a")}


# --------------------------------------------------------------------- which side is the better one


@pytest.mark.parametrize(
    ("value", "column", "first", "second", "expected"),
    [
        (1, "labels", "human_ref_A", "human_ref_B", True),
        (0, "labels", "human_ref_A", "human_ref_B", False),
        ("B", "winner", "response_a", "response_b", False),
        ("model_a", "winner", "response_a", "response_b", True),
        ("response_b", "winner", "response_a", "response_b", False),
        (0, "better_response_id", "response_0", "response_1", True),
        (1, "better_response_id", "response_0", "response_1", False),
        (1, "better_response_id", "response_1", "response_0", True),
        (2, "preference", "response_1", "response_2", False),
        (1, "winner_model_a", "response_a", "response_b", True),
        (1, "winner_model_b", "response_a", "response_b", False),
        (1, "winner_model_a", "response_b", "response_a", False),
        (True, "swapped", "chosen", "rejected", False),
        ("rejected", "label", "chosen", "rejected", False),
        (-1, "overall_preference", "response1", "response2", None),
        (3, "overall_preference", "response1", "response2", None),
        (0.5, "label", "a", "b", None),
    ],
)
def test_a_label_names_the_better_side(
    value: Any, column: str, first: str, second: str, expected: bool | None
) -> None:
    if expected is None:
        with pytest.raises(UnusableRow, match=f"column '{column}'"):
            is_first_better(value, column, first=first, second=second)
    else:
        assert is_first_better(value, column, first=first, second=second) is expected
        (question,), _, _ = take(
            {"prompt": "q", first: "a", second: "b", column: value},
            chosen=first,
            rejected=second,
            label=column,
        )
        assert pairs_in(question) == {("a", "b") if expected else ("b", "a")}


@pytest.mark.parametrize(
    "labels",
    [
        {"winner": "tie"},
        {"winner": "tie (bothbad)"},
        {"winner": "both_bad"},
        {"winner": 0, "winner_tie": 1} | {"w_a": 0, "w_b": 0},
    ],
)
def test_a_tie_is_left_out_by_rule(labels: dict[str, Any]) -> None:
    row = {"prompt": "q", "response_a": "x", "response_b": "y"} | labels
    label = "w_a" if "w_a" in labels else "winner"
    questions, bad, seen = take(row, chosen="response_a", rejected="response_b", label=label)
    assert (questions, bad.reasons, seen.left_out) == ([], {}, {"rows whose label calls it a tie": 1})


def test_labels_of_each_side() -> None:
    row = {
        "prompt": "q",
        "response_a": "x",
        "response_b": "y",
        "winner_model_a": 0,
        "winner_model_b": 1,
        "winner_tie": 0,
    }
    for label in ("winner_model_a", "winner_model_b"):
        (question,), _, _ = take(row, chosen="response_a", rejected="response_b", label=label)
        assert pairs_in(question) == {("y", "x")}


def test_a_label_that_a_row_lacks_is_no_label() -> None:
    assert list(take({"prompt": "q", "chosen": "a", "rejected": "b"}, label="typo")[1].reasons) == [
        "rows without a label (column 'typo'; list it in source.ignored if it is none)"
    ]
    assert not is_good_label(True, "is_toxic")
    assert is_good_label(0, "harmful")
    assert is_good_label("safe", "is_safe")


@pytest.mark.parametrize(
    ("names", "first", "second", "expected"),
    [
        (["score_A", "score_B", "score_ratio"], "human_ref_A", "human_ref_B", ("score_A", "score_B")),
        (["score_chosen", "score_rejected"], "chosen", "rejected", ("score_chosen", "score_rejected")),
        (["chosen-rating", "rejected-rating"], "chosen", "rejected", ("chosen-rating", "rejected-rating")),
        (["chosenScore", "rejectedScore"], "chosen", "rejected", ("chosenScore", "rejectedScore")),
        (["rank_0", "rank_1"], "response_0", "response_1", None),
        (["score_chosen"], "chosen", "rejected", None),
        (["score_A", "score_B"], "good", "worse_one", None),
    ],
)
def test_scores_of_both_sides_are_found_by_their_names(
    names: list[str], first: str, second: str, expected: tuple[str, str] | None
) -> None:
    assert find_twin_scores(names, first=first, second=second) == expected


SHP = {"history": "q", "human_ref_A": "x", "human_ref_B": "y", "c_root_id_A": "r", "score_ratio": 2.5}


def shp(number: int) -> dict[str, Any]:
    """Return a row in which side A is the better one for every third number only."""
    is_a = number % 3 == 0
    texts = {
        "history": f"question number {number}",
        "human_ref_A": f"A says {is_a}",
        "human_ref_B": f"B says {not is_a}",
    }
    return SHP | texts | {"labels": int(is_a), "score_A": 9 if is_a else 2, "score_B": 2 if is_a else 9}


def test_shp_is_read_by_its_label_and_warned_of_without_it(tmp_path: Path) -> None:
    rows = [shp(number) for number in range(90)]
    path = tmp_path / "shp.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "own", "prompt": "history", "chosen": "human_ref_A", "rejected": "human_ref_B"}
    with pytest.raises(InputError, match=r"'labels' may turn .*\(name it in source\.scores or source\.label"):
        run_data_program(path, tmp_path / "refused", source)
    artifact, card = run_data_program(path, tmp_path / "labelled", source | {"label": "labels"})
    assert all(
        row["chosen"].endswith("True") and row["rejected"].endswith("False")
        for row in read_table(artifact, "reward")
    )
    assert (card["opposed"], card["unread_columns"]) == ({}, {"c_root_id_A": 90, "score_ratio": 90})
    artifact, card = run_data_program(path, tmp_path / "named", source | {"ignored": ["labels"]})
    assert card["opposed"] == {"'score_A' and 'score_B'": 60}
    (warning,) = json.loads((artifact / "summary.json").read_text())["warnings"]
    assert warning.startswith(
        "60 of 90 rows have scores ('score_A' and 'score_B') that say the opposite of their comparison: "
    )


# --------------------------------------------------------------------------------------- test files


@pytest.mark.parametrize(
    "path",
    [
        "test.jsonl",
        "test_prefs-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
        "data/test_sft-00000-of-00001.parquet",
        "helpful-base/test.jsonl.gz",
        "my-test-rows.json",
        "test1.jsonl",
        "TEST.JSONL",
        "rowsTest.jsonl",
        "validation.json",
        "data/validation-00000-of-00001.parquet",
        "valid.jsonl",
        "val/a.jsonl",
        "dev.jsonl.gz",
        "eval.jsonl",
        "data/evaluation/train-00000-of-00004.parquet",
        "test/data-00000-of-00001.arrow",
        "held_out.jsonl",
        "holdout/x.json",
        "testset.jsonl",
    ],
)
def test_names_of_test_sets(path: str) -> None:
    assert is_test(path)


@pytest.mark.parametrize(
    "path",
    [
        "latest.jsonl",
        "contest/rows.jsonl",
        "greatest-hits.json",
        "train.jsonl",
        "data/train_prefs-00000.parquet",
        "devices.jsonl",
        "retrieval.json",
        "invalid.jsonl",
        "medieval.jsonl",
        "developer.jsonl",
        "validated.jsonl",
        "train_test_split/train.jsonl",
        "attestation.json",
        "value.json",
    ],
)
def test_names_that_are_none(path: str) -> None:
    assert not is_test(path)


def test_a_split_column_keeps_rows_for_evaluation(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"question number {n}",
            "chosen": "a",
            "rejected": "b",
            "split": "test" if n % 5 == 0 else "train",
        }
        for n in range(150)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    artifact, card = run_data_program(tmp_path / "rows.jsonl", tmp_path / "run", {"kind": "own"})
    assert card["noticed"] == {"rows that their column 'split' keeps for evaluation": 30}
    assert {row["prompt"] for row in read_table(artifact, "evaluation")} == {
        row["prompt"] for row in rows if row["split"] == "test"
    }


def test_the_published_sets_keep_their_test_files_for_evaluation() -> None:
    paired = {"question": "q", "response_j": "a", "response_k": "b"}
    for file, split in (("data/evaluation/0.parquet", "evaluation"), ("data/reward/0.parquet", "")):
        assert [
            question.split
            for question in questions_of(
                stack_exchange_sets.group_pairs(as_rows(paired, file=file), Quarantine())
            )
        ] == [split]


# ------------------------------------------------------------------- other files of a published set


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        (
            "hh-rlhf",
            lambda n: {
                side: f"\n\nHuman: question {n}?\n\nAssistant: {side} {n}" for side in ("chosen", "rejected")
            },
        ),
        (
            "stack-exchange-paired",
            lambda n: {"question": f"question {n}?", "response_j": f"a {n}", "response_k": f"b {n}"},
        ),
        (
            "stack-exchange-preferences",
            lambda n: {
                "qid": n,
                "question": f"<p>question {n}?</p>",
                "answers": [{"answer_id": k, "pm_score": k, "text": f"{k} {n}"} for k in (1, 2)],
            },
        ),
    ],
)
def test_what_lies_beside_a_published_sets_rows_is_named_and_not_read(
    tmp_path: Path, kind: str, good: Any
) -> None:
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(good(n)) for n in range(150)))
    (folder / "more" / "attempts.jsonl").write_text(
        "\n".join(json.dumps({"transcript": "\n\nHuman: x", "rating": n}) for n in range(150))
    )
    (folder / "more" / "about.json").write_text(json.dumps([{"name": "a set"}]))
    _, card = run_data_program(folder, tmp_path / "run", {"kind": kind})
    assert (card["rows_seen"], card["quarantined"]) == (150, {})
    assert card["other_files"] == ["more/about.json", "more/attempts.jsonl"]


def test_a_set_without_a_file_of_its_columns_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"transcript": "x"}) for _ in range(9)))
    with pytest.raises(InputError, match="18 rows without two dialogues"):
        run_data_program(folder, tmp_path / "run", {"kind": "hh-rlhf"})


@pytest.mark.parametrize(("files", "unwanted"), [("", ["red-team-attempts/*"]), ("helpful-*/*", None)])
def test_the_hub_is_asked_for_the_dialogues_of_hh_rlhf(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: str, unwanted: list[str] | None
) -> None:
    calls: list[dict[str, Any]] = []

    def download(hub_id: str, **arguments: Any) -> str:
        calls.append({"id": hub_id} | arguments)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert corpus.find_corpus(HhRlhf(files=files)) == tmp_path
    assert corpus.find_corpus(OwnRows(path="somebody/hh-rlhf")) == tmp_path
    assert [call["ignore_patterns"] for call in calls] == [unwanted, None]
    assert hub.is_hub_id(calls[0]["id"])


# ----------------------------------------------------------------------------------------- the card


def test_columns_of_many_names_do_not_fill_the_card(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"question number {n}",
            "chosen": "a",
            "rejected": "b",
            "kind": 1,
            f"\x1bcolumn {n:04}" + "x" * 900: 1,
        }
        for n in range(1200)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    _, card = run_data_program(tmp_path / "rows.jsonl", tmp_path / "run", {"kind": "own"})
    assert len(card["unread_columns"]) == 100
    assert card["unread_columns"]["kind"] == 1200
    assert all(
        name == "kind" or (len(name) == 40 and name.startswith("�column 0"))
        for name in card["unread_columns"]
    )


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("labels", ("labels",)),
        ("[labels, a b]", ("labels", "a b")),
        ("", ()),
        ('["x,y"]', ("x,y",)),
        ("[]", ()),
    ],
)
def test_columns_are_named_on_the_command_line_as_one_types_them(typed: str, names: tuple[str, ...]) -> None:
    for setting in ("ignored", "context"):
        source = OwnRows.model_validate({"path": "x", setting: read_argument(f"source.{setting}", typed)})
        assert getattr(source, setting) == names


def test_a_column_that_no_row_has_is_warned_of(tmp_path: Path) -> None:
    rows = [{"prompt": f"question number {n}", "chosen": "a", "rejected": "b"} for n in range(150)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    artifact, _ = run_data_program(
        tmp_path / "rows.jsonl", tmp_path / "run", {"kind": "own", "system": "sytem", "context": ["passage"]}
    )
    warnings = json.loads((artifact / "summary.json").read_text())["warnings"]
    assert [sentence.partition(":")[0] for sentence in warnings] == ["source.system", "source.context"]


def test_a_refused_set_names_the_columns_it_has(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"question": "q", "a": n}) for n in range(20)))
    with pytest.raises(
        InputError, match=r"name its columns in source \(these rows have 'a', 'question'\)\.$"
    ):
        run_data_program(tmp_path / "rows.jsonl", tmp_path / "run", {"kind": "own"})


def test_words_of_names() -> None:
    names = ["response_0", "chosenScore", "human-ref-A", "overall_preference", "ID"]
    expected = ["response 0", "chosen score", "human ref a", "overall preference", "id"]
    assert [" ".join(split_words(name)) for name in names] == expected
    assert find_value({"a": [{"b": 1}, 3]}, "a.b") == [1, None]


# ------------------------------------------------------------------------- shapes of published sets


CHATML = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq?<|im_end|>\n<|im_start|>assistant\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq?<|eot_id|><|start_header_id|>"
    "assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize(
    ("prompt", "end", "expected"),
    [
        (CHATML, "<|im_end|>", "System: Be brief.\n\nHuman: q?"),
        (LLAMA, "<|eot_id|>", "q?"),
        ("<bos><start_of_turn>user\nq?<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n", "q?"),
        ("<|user|>\nq?</s>\n<|assistant|>\n", "</s>", "q?"),
        ("<|user|>\nq?<|end|>\n<|assistant|>\n", "<|end|>", "q?"),
        ("<|prompter|>q?<|endoftext|><|assistant|>", "<|endoftext|>", "q?"),
        ("<s>[INST] q? [/INST]", " </s>", "q?"),
        ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq? [/INST]", "</s>", "System: Be brief.\n\nHuman: q?"),
        (
            "<s>[INST] a? [/INST] b. </s><s>[INST] q? [/INST]",
            "</s>",
            "Human: a?\n\nAssistant: b.\n\nHuman: q?",
        ),
        ("### Human: q?### Assistant:", "", "q?"),
        ("\n\nHuman: q?\n\nAssistant:", "", "q?"),
        ("Human: q?\n\nAssistant: ", "", "q?"),
        (
            "\n\nHuman: a?\n\nAssistant: b.\n\nHuman: q?\n\nAssistant:",
            "",
            "Human: a?\n\nAssistant: b.\n\nHuman: q?",
        ),
    ],
)
def test_what_a_template_has_written_out_is_read_as_messages(prompt: str, end: str, expected: str) -> None:
    rows = [
        {"prompt": prompt, "chosen": f" a{end}", "rejected": f" b{end}"},
        {"chosen": f"{prompt} a{end}", "rejected": f"{prompt} b{end}"},
        {"prompt": prompt, "chosen": f"{prompt} a{end}", "rejected": f"{prompt} b{end}"},
    ]
    for row in rows if prompt.startswith(("<", "#", "\n")) else rows[:1]:
        (question,), bad, _ = take(row)
        assert (question.prompt, pairs_in(question), sum(bad.reasons.values())) == (expected, {("a", "b")}, 0)


@pytest.mark.parametrize(
    "text",
    [
        "Strike it: <s>x</s>",
        "What does <|im_start|>user mean?",
        "Human: x",
        "The Human: part\n\nAssistant: x",
        "<|endoftext|>",
        "a < b",
        "<p>x</p>",
    ],
)
def test_texts_that_only_mention_a_template_stay(text: str) -> None:
    (question,), bad, seen = take({"prompt": text, "completion": text + " "})
    assert (question.prompt, question.answers[0].text, sum(bad.reasons.values()), seen.noticed) == (
        text,
        text,
        0,
        {},
    )


@pytest.mark.parametrize("form", [json.dumps, lambda turns: turns])
def test_lists_of_turns_are_conversations(form: Any) -> None:
    """As in lmsys-arena-human-preference-55k."""
    names = {"chosen": "response_a", "rejected": "response_b", "label": "winner_model_a"}

    def row(
        asked: list[str], first: list[str | None], second: list[str | None], **more: Any
    ) -> dict[str, Any]:
        return {
            "prompt": form(asked),
            "response_a": form(first),
            "response_b": form(second),
            "winner_model_a": 0,
            "winner_model_b": 1,
        } | more

    (question,), _, _ = take(row(["q"], ["a"], ["b"]), **names)
    assert (question.prompt, pairs_in(question)) == ("q", {("b", "a")})
    (question,), _, _ = take(row(["q", "r"], ["a", "b"], ["a", "c"]), **names)
    assert (question.prompt, pairs_in(question)) == ("Human: q\n\nAssistant: a\n\nHuman: r", {("c", "b")})
    questions, bad, seen = take(row(["q", "r"], ["a", "b"], ["x", "c"]), row(["q"], [None], ["b"]), **names)
    assert (questions, sum(seen.left_out.values()), sum(bad.reasons.values())) == ([], 1, 1)
    (question,), _, _ = take({"prompt": form(["q"]), "completion": form(["a"])})
    assert (question.prompt, question.answers[0].text) == ("q", "a")


@pytest.mark.parametrize(
    "text",
    ["<|im_start|>user\n", "[INST]", "[INST]<<SYS>> ", " ", "\n\nHuman:", "### Human:", "<s>", "</s> "],
)
def test_no_written_out_text_takes_long(text: str) -> None:
    before = time.process_time()
    take(
        {"prompt": text * 20_000, "completion": text * 20_000},
        {"prompt": text + " " * 100_000, "completion": " " * 100_000 + text},
    )
    assert time.process_time() - before < 30  # a second or so; a minute or more if it is quadratic


def test_answers_that_are_lists_stay_where_the_prompt_is_a_text() -> None:
    (question,), _, _ = take({"prompt": "Sort b, a.", "completion": '["a", "b"]'})
    assert question.answers[0].text == '["a", "b"]'


@pytest.mark.parametrize(
    ("label", "expected"),
    [(-3, ("a", "b")), (-1, ("a", "b")), (1, ("b", "a")), ("2", ("b", "a")), (3.0, ("b", "a")), (0, None)],
)
def test_a_label_whose_sign_tells(label: Any, expected: tuple[str, str] | None) -> None:
    """As in HelpSteer3."""
    row = {"context": [U("q")], "response1": "a", "response2": "b", "overall_preference": label}
    names = {
        "prompt": "context",
        "chosen": "response1",
        "rejected": "response2",
        "label": "overall_preference",
    }
    for turned in (False, True):
        questions, bad, seen = take(row, **names, negative_is_first=not turned)
        assert [pairs_in(question) for question in questions] == (
            [{expected[::-1] if turned else expected}] if expected else []
        )
        assert (sum(bad.reasons.values()), sum(seen.left_out.values())) == (0, 0 if expected else 1)
    if label in (-3, -1, 3):
        ((reason, _),) = take(row, **names)[1].reasons.items()
        assert "source.negative_is_first" in reason


@pytest.mark.parametrize(("role", "content"), [("role", "content"), ("from", "value")])
def test_messages_that_are_stored_by_their_fields(role: str, content: str) -> None:
    """As parquet has a Sequence of `datasets`."""
    sides = [{role: ["user", "assistant"], content: ["q", answer]} for answer in ("a", "b")]
    (question,), _, _ = take({"chosen": sides[0], "rejected": sides[1]})
    assert (question.prompt, pairs_in(question)) == ("q", {("a", "b")})
    assert sum(take({"completion": {role: ["user", "assistant"], content: ["q"]}})[1].reasons.values()) == 1


def test_rows_whose_sides_part_early_are_left_out_and_counted() -> None:
    """As multi-turn rows of an arena are: they are valid, so they do not count against data.max_bad_share."""
    questions, bad, seen = take({"chosen": [U("p"), A("x")], "rejected": [U("q"), A("y")]})
    assert (questions, dict(bad.reasons)) == ([], {})
    assert seen.left_out == {
        "rows whose sides differ before the last answer (columns 'chosen' and 'rejected')": 1
    }


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        *(
            ("A>B", "a"),
            ("[[A>>B]]", "a"),
            ("b > a", "b"),
            ("A<B", "b"),
            ("A=B", None),
            ("[[B]]", "b"),
            ("Response A", "a"),
        ),
        *(
            ("B is better than A", "names both"),
            ("not response_a", "names neither"),
            ("A>C", "names neither"),
        ),
    ],
)
def test_a_verdict_of_words_is_read_only_where_it_is_clear(label: str, expected: str | None) -> None:
    row = {"prompt": "q", "response_a": "a", "response_b": "b", "winner": label}
    questions, bad, seen = take(row, chosen="response_a", rejected="response_b", label="winner")
    found = [better for question in questions for better, _ in pairs_in(question)]
    if expected is None:
        assert (found, sum(seen.left_out.values())) == ([], 1)
    elif len(expected) > 1:
        assert found == []
        assert expected in next(iter(bad.reasons))
    else:
        assert found == [expected]


@pytest.mark.parametrize(("label", "expected"), [(1, "a"), (2, "b"), ("1.0", "a"), (0, None), (3, None)])
def test_a_number_that_names_no_column_of_two_numbered_ones_says_nothing(
    label: Any, expected: str | None
) -> None:
    row = {"prompt": "q", "response_1": "a", "response_2": "b", "preference": label}
    questions, bad, _ = take(row, chosen="response_1", rejected="response_2", label="preference")
    assert [better for question in questions for better, _ in pairs_in(question)] == (
        [expected] if expected else []
    )
    assert sum(bad.reasons.values()) == (expected is None)


@pytest.mark.parametrize(
    ("context", "prompt"), [(["one", " two "], "q\n\none\n\ntwo"), ([], "q"), ([""], "q")]
)
def test_passages_are_put_after_the_question(context: list[str], prompt: str) -> None:
    (question,), _, _ = take({"prompt": "q", "context": context, "completion": "a"})
    assert question.prompt == prompt


def test_elements_of_lists_are_columns_too() -> None:
    """As in OpenAI's summarize_from_feedback."""
    row = {"info": {"post": "q"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    names = {
        "prompt": "info.post",
        "chosen": "summaries.0.text",
        "rejected": "summaries.1.text",
        "label": "choice",
    }
    (question,), _, _ = take(row, **names)
    assert pairs_in(question) == {("b", "a")}
    assert find_value({"a": [1]}, "a.1") is None


def test_all_columns_that_decide_are_named_at_once() -> None:
    ((reason, _),) = take({"prompt": "q", "completion": "a", "score": 3, "quality": "good", "is_safe": True})[
        1
    ].reasons.items()
    assert "columns 'score', 'quality' and 'is_safe' may turn" in reason
    ((reason, _),) = take({"prompt": "q", "completion": "a"} | {f"score_{n}": n for n in range(300)})[
        1
    ].reasons.items()
    assert "'score_6', 'score_7' and 292 more may turn" in reason
