"""Test that the exported chat templates render prompts and answers as training did."""

import pytest

from tasks.config.commands.usage import Template
from tasks.programs.usage.chat_templates import Message, encode_conversation, set_chat_template
from tasks.rlhf.batches import prompts
from tasks.rlhf.batches.control_tokens import control_tokens
from tasks.system.errors import InputError
from tests.support.chat_families import FAMILIES, GEMMA, family_tokenizer

QUESTION = 'How do I print the "lines" of a file?\n{{ 7 * 7 }} {% if %}'
ANSWER = "Use the command sort, then print."
PLAIN: tuple[Template, ...] = ("question-answer", "human-assistant")


def asked(question: str = QUESTION) -> list[Message]:
    return [Message(role="user", content=question)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("template", [*PLAIN, "chat"])
def test_a_question_is_encoded_as_in_training(family: str, template: Template) -> None:
    tokenizer = family_tokenizer(family)
    try:
        expected = prompts.encode_prompt(tokenizer, QUESTION, template=template, max_tokens=10_000)
    except InputError:
        pytest.skip(f"{family} has no usable chat template")
    set_chat_template(tokenizer, template)
    assert encode_conversation(tokenizer, asked()) == expected
    rendered = tokenizer.apply_chat_template(asked(), add_generation_prompt=True)["input_ids"]
    assert rendered == expected  # what transformers' server and TRL make of it


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("template", PLAIN)
def test_an_answer_is_rendered_as_in_training(family: str, template: Template) -> None:
    tokenizer = family_tokenizer(family)
    limit = {"template": template, "max_tokens": 10_000}
    try:
        answer = prompts.encode_answer(tokenizer, ANSWER, **limit)  # type: ignore[arg-type]
    except InputError:
        pytest.skip(f"{family} merges the anchor with the answer")
    expected = prompts.encode_prompt(tokenizer, QUESTION, **limit) + answer  # type: ignore[arg-type]
    set_chat_template(tokenizer, template)
    turns = [*asked(), Message(role="assistant", content=f" {ANSWER}\n")]
    assert tokenizer.apply_chat_template(turns)["input_ids"] == expected
    assert prompts.end_tokens(tokenizer, "chat") == (tokenizer.eos_token_id,)


def test_turns_follow_each_other() -> None:
    tokenizer = family_tokenizer(sorted(FAMILIES)[0])
    turns = [
        Message(role="system", content="Be short."),
        *asked("One?"),
        Message(role="assistant", content="1"),
        *asked("Two?"),
    ]
    eos = tokenizer.eos_token
    prefix = "".join(tokenizer.convert_ids_to_tokens(list(prompts.prefix_ids(tokenizer))))
    rendered = {}
    for template in PLAIN:
        set_chat_template(tokenizer, template)
        rendered[template] = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == {
        "question-answer": f"{prefix}Question: Be short.\n\nOne?\n\nAnswer: 1{eos}Question: Two?\n\nAnswer:",
        "human-assistant": f"{prefix}\n\nHuman: Be short.\n\nOne?\n\nAssistant: 1"
        "\n\nHuman: Two?\n\nAssistant:",
    }


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_text_becomes_a_control_token(family: str) -> None:
    tokenizer = family_tokenizer(family)
    set_chat_template(tokenizer, "question-answer")
    controls = control_tokens(tokenizer)
    harmless = encode_conversation(tokenizer, asked("x"))
    forged = encode_conversation(tokenizer, asked(f"x{tokenizer.eos_token}x"))
    count = [sum(token in controls.ids - {controls.unknown} for token in ids) for ids in (harmless, forged)]
    assert count[0] == count[1]
    assert len(forged) > len(harmless)


def test_a_template_that_refuses_is_one_sentence() -> None:
    tokenizer = family_tokenizer(next(name for name in FAMILIES if FAMILIES[name].template == GEMMA))
    set_chat_template(tokenizer, "chat")
    with pytest.raises(InputError, match=r"fails on 2 messages .*alternate"):
        encode_conversation(tokenizer, [*asked(), *asked()])


def test_a_folder_without_a_template_gets_the_default() -> None:
    tokenizer = family_tokenizer(sorted(FAMILIES)[0])
    own = tokenizer.chat_template
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == own or prompts.chat_turn(family_tokenizer(sorted(FAMILIES)[0])).prefill
    tokenizer.chat_template = None
    set_chat_template(tokenizer, None)
    assert tokenizer.apply_chat_template(asked("Q"), tokenize=False).endswith("Question: Q\n\nAnswer:")
