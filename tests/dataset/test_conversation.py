"""Test that messages reach the tables of the data stage, masked, beside the prompt written of them."""

import json
from collections import Counter
from pathlib import Path

from tasks.dataset.columns import from_rows, to_rows
from tasks.dataset.conversation import Messages, from_records
from tasks.dataset.curation.rules import Rules
from tasks.dataset.question import Question
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.sources import hh_rlhf
from tests.dataset.sources.test_own_rows import take
from tests.support.data_sets import as_rows, chat_message, questions_of, read_table, run_data_program
from tests.support.questions.question_rows import apply_rules

TURNS: Messages = (("system", "Be brief."), ("user", "I am ann@mail.de."), ("assistant", "Hello!"))
MASKED = "System: Be brief.\n\nHuman: I am <email>.\n\nAssistant: Hello!\n\nHuman: How {}?"


def talk(number: int) -> list[dict[str, str]]:
    return [*(chat_message(role, text) for role, text in TURNS), chat_message("user", f"How {number}?")]


def one_question(prompt: str, messages: Messages) -> Question:
    (question,), _, _ = take(
        {"prompt": [chat_message(role, text) for role, text in messages], "completion": "So."}
    )
    assert (question.prompt, question.messages) == (prompt, messages)
    return question


def test_every_table_has_the_masked_messages(tmp_path: Path) -> None:
    rows = [
        {"prompt": talk(n), "chosen": f"good {n}", "rejected": f"bad {n}"} if n % 2 else
        {"prompt": f"Why {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"}
        for n in range(80)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    artifact, card = run_data_program(path, tmp_path / "run", {"kind": "own"})
    assert card["masked"] == {"email": 40}
    seen = Counter[bool]()
    for name in ("finetune", "corpus", "reward", "reward_groups", "rl", "evaluation", "evaluation_pairs"):
        for row in read_table(artifact, name):
            messages = from_records(row["messages"])
            seen[bool(messages)] += 1
            if not messages:
                assert row["prompt"].startswith("Why")
                continue
            number = messages[-1][1].removeprefix("How ").removesuffix("?")
            assert row["prompt"] == MASKED.format(number)
            assert messages[:-1] == (TURNS[0], ("user", "I am <email>."), TURNS[2])
    assert min(seen.values()) > 40


def test_personal_data_in_a_message_drops_the_question() -> None:
    question = one_question(MASKED.format(1).replace("<email>", "ann@mail.de"), (*TURNS, ("user", "How 1?")))
    dropped, masked = Counter[str](), Counter[str]()
    assert apply_rules(question, Rules(personal="drop"), dropped, masked) is None
    assert dropped["questions with personal data"] == 1
    assert apply_rules(question, Rules(), dropped, masked) == question


def test_a_question_comes_back_from_columns_with_its_messages() -> None:
    questions = [
        Question(number, "q", "", "site", "", "", "", (), messages=messages)
        for number, messages in enumerate(((*TURNS, ("user", "How?")), ()))
    ]
    assert to_rows(from_rows(questions)) == questions


def test_a_prompt_that_does_not_end_with_a_user_is_refused() -> None:
    questions, bad, _ = take(
        {"prompt": [chat_message("user", "Hi"), chat_message("assistant", "Hello!")], "completion": "So."}
    )
    assert questions == []
    assert list(bad.reasons) == ["rows whose prompt does not end with the user's message (column 'prompt')"]


def test_dialogues_of_hh_rlhf_have_messages() -> None:
    dialogue = "\n\nHuman: Hi \n\nAssistant: Hello:\nHuman:\n\nHuman: A pear?\n\nAssistant: {}"
    (question,) = questions_of(
        hh_rlhf.group_rows(
            as_rows({"chosen": dialogue.format("Yes."), "rejected": dialogue.format("No.")}),
            Counter(),
            Quarantine(),
            one_turn=False,
        )
    )
    assert question.prompt == "Human: Hi \n\nAssistant: Hello:\nHuman:\n\nHuman: A pear?"
    assert question.messages == (("user", "Hi"), ("assistant", "Hello:\nHuman:"), ("user", "A pear?"))
    one = "\n\nHuman: Human: Hi\n\nAssistant: {}"
    (question,) = questions_of(
        hh_rlhf.group_rows(
            as_rows({"chosen": one.format("Yes."), "rejected": one.format("No.")}),
            Counter(),
            Quarantine(),
            one_turn=True,
        )
    )
    assert (question.prompt, question.messages) == ("Human: Hi", ())
