"""Questions and answers as tokens: only the question is ever cut, and parts joined are the whole text's tokens."""

import random

import pytest
from transformers import PreTrainedTokenizerBase

from tasks.rlhf.batches.prompts import decode_answer, encode_answer, encode_prompt
from tasks.rlhf.models import loading
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.paths import SHARED

STORIES = SHARED / "models" / "stories260k-hf"
ANSWERS = (
    "Use `ls -l`.",
    "yes",
    "1. one\n2. two",
    "```\nls\n```",
    "Straße, naïve, 日本語",
    "  spaces around  ",
    "\n\nlines before",
)


@pytest.fixture(
    scope="module",
    params=[
        "byte-level",
        pytest.param(
            "stories260k", marks=pytest.mark.skipif(not STORIES.is_dir(), reason="no shared/models here")
        ),
    ],
)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return tiny.tokenizer() if request.param == "byte-level" else loading.load_tokenizer(STORIES)


def prompt(tokenizer: PreTrainedTokenizerBase, question: str, max_tokens: int = 10_000) -> list[int]:
    return encode_prompt(tokenizer, question, template="question-answer", max_tokens=max_tokens)


def answer(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int = 10_000) -> list[int]:
    return encode_answer(tokenizer, text, template="question-answer", max_tokens=max_tokens)


def plain(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


@pytest.mark.parametrize("text", ANSWERS)
def test_prompt_and_answer_are_the_tokens_of_the_whole_text(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    whole = tokenizer(f"Question: How do I list files?\n\nAnswer: {text.strip()}")["input_ids"]
    assert prompt(tokenizer, "How do I list files?") + answer(tokenizer, text) == [
        *whole,
        tokenizer.eos_token_id,
    ]


@pytest.mark.parametrize("text", ANSWERS)
def test_an_answer_comes_back_as_it_was(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert decode_answer(tokenizer, answer(tokenizer, text), template="question-answer") == text.strip()


def test_the_prompt_ends_at_the_colon_and_the_answer_begins_with_the_space(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert plain(tokenizer, prompt(tokenizer, "Why?")) == "Question: Why?\n\nAnswer:"
    first = tokenizer.convert_ids_to_tokens(answer(tokenizer, "list")[:1])[0]
    assert first[0] in "Ġ▁"


def test_a_long_prompt_loses_the_end_of_its_question_only(tokenizer: PreTrainedTokenizerBase) -> None:
    question = "How do I sort? " + tiny.text(random.Random(0), 300)
    for max_tokens in (30, 64, 65, 66, 67, 200):
        ids = prompt(tokenizer, question, max_tokens)
        assert len(ids) <= max_tokens
        text = plain(tokenizer, ids)
        assert text.startswith("Question: ")
        assert text.endswith("\n\nAnswer:")
        kept = text.removeprefix("Question: ").removesuffix("\n\nAnswer:")
        assert question.startswith(kept)
        assert len(ids) > 0.8 * max_tokens  # no more than needed
    assert prompt(tokenizer, question, len(prompt(tokenizer, question))) == prompt(tokenizer, question)


def test_the_answer_never_shrinks_for_the_prompts_sake(tokenizer: PreTrainedTokenizerBase) -> None:
    long = "Use sort. " * 30
    assert len(answer(tokenizer, long)) > 100
    assert answer(tokenizer, long)[-1] == tokenizer.eos_token_id
    cut = answer(tokenizer, long, 20)
    assert cut == answer(tokenizer, long)[:20]
    assert tokenizer.eos_token_id not in cut  # what was cut did not end


def test_an_answer_that_just_fits_keeps_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = answer(tokenizer, "Use sort.")
    assert answer(tokenizer, "Use sort.", len(whole)) == whole


def test_no_room_for_a_question_is_the_users_to_mend(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="max_prompt_tokens=4"):
        prompt(tokenizer, "How?", 4)


def test_special_tokens_written_in_a_post_are_plain_text(tokenizer: PreTrainedTokenizerBase) -> None:
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    written = f"What is {tokenizer.eos_token} and {tokenizer.pad_token}?"
    assert not special & set(prompt(tokenizer, written))
    ids = answer(tokenizer, written)
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1
    assert decode_answer(tokenizer, ids, template="question-answer") == written


def test_chat_needs_a_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="chat template"):
        encode_prompt(tokenizer, "How?", template="chat", max_tokens=100)


def test_the_chat_template_shapes_the_prompt() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
    )
    ids = encode_prompt(tokenizer, "How?", template="chat", max_tokens=100)
    assert tokenizer.decode(ids) == "<user>How?<eos><assistant>"
    assert ids.count(tiny.EOS) == 1
    assert plain(
        tokenizer, encode_prompt(tokenizer, "How do I sort? " * 20, template="chat", max_tokens=60)
    ).endswith("<assistant>")
    assert encode_answer(tokenizer, " Use sort. ", template="chat", max_tokens=100) == [
        *tokenizer("Use sort.")["input_ids"],
        tiny.EOS,
    ]
