"""Test that chat templates that write the date write one date, wherever and on whatever day."""

from datetime import datetime

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.judges.judge import Answer, Battle
from tasks.judges.prompt_encoder import PromptEncoder
from tasks.programs.usage.chat_templates import Message, encode_conversation, set_chat_template
from tasks.rlhf.batches.conversations import encode_messages
from tasks.rlhf.batches.prompts import DATE, encode_prompt, render
from tests.support.chat_families import DATED, family_tokenizer, set_day

OTHER_DAY = datetime(2031, 3, 4)
TALK = [("user", "Which day is it?"), ("assistant", "Look above."), ("user", "And tomorrow?")]


@pytest.fixture(params=DATED)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    made = family_tokenizer("llama3")
    made.chat_template = DATED[request.param]
    return made


def own_rendering(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what transformers makes of a conversation."""
    fields = [{"role": role, "content": text} for role, text in TALK]
    rendered = tokenizer.apply_chat_template(fields, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    return rendered


def test_texts_are_those_of_the_fixed_date_on_every_day(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_day(monkeypatch, DATE)
    expected = own_rendering(tokenizer)
    set_day(monkeypatch, OTHER_DAY)
    assert own_rendering(tokenizer) != expected
    assert render(tokenizer, TALK, "three messages") == expected


def test_training_chat_and_judges_make_equal_tokens_on_every_day(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    battle = Battle("Which day is it?", Answer("Monday"), Answer("Look above."))
    judge = PromptEncoder(tokenizer, "Compare: {question} {first} {second}", 1000, opens_reply=False)
    found = []
    for day in (DATE, OTHER_DAY):
        set_day(monkeypatch, day)
        found.append(
            [
                encode_prompt(tokenizer, "Which day is it?", template="chat", max_tokens=1000),
                encode_messages(tokenizer, TALK, "chat"),
                encode_conversation(tokenizer, [Message(role=role, content=text) for role, text in TALK]),
                judge.encode(battle),
            ]
        )
    assert found[0] == found[1]
    assert found[0][1] == found[0][2]


def test_an_exported_tokenizer_keeps_its_own_template(tokenizer: PreTrainedTokenizerBase) -> None:
    own = tokenizer.chat_template
    encode_prompt(tokenizer, "Which day is it?", template="chat", max_tokens=1000)
    set_chat_template(tokenizer, "chat")
    assert tokenizer.chat_template == own
