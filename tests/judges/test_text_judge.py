"""Test the judge by written text: what it writes, batches, ends, and long prompts."""

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.judges import text_judge
from tasks.judges.judge import Answer, Battle
from tasks.judges.text_judge import Settings, TextJudge, Written
from tasks.rlhf.models import loading
from tasks.system.errors import InputError
from tests.support import tiny

TEMPLATE = "Q: {question}\nA: {first}\nB: {second}\nBetter?"
BATTLES = [
    Battle("Use tar?", Answer("Yes, use it."), Answer("No.")),
    Battle("Copy files?", Answer("cp a b"), Answer("Use copy.")),
    Battle("Why?", Answer("A"), Answer("")),
]
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def silent(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tiny.base_folder(tmp_path_factory.mktemp("judge") / "base")
    return loading.load(folder, device=torch.device("cpu")), loading.load_tokenizer(folder)


def judge(loaded: Loaded, *, batch_size: int = 2, max_reply_tokens: int = 12) -> TextJudge:
    return TextJudge("the judge", *loaded, Settings(TEMPLATE, 100, max_reply_tokens, batch_size))


@torch.no_grad()
def greedy(loaded: Loaded, battle: Battle, count: int) -> Written:
    """Return the reply by one forward pass on the whole text for each token."""
    model, tokenizer = loaded
    text = TEMPLATE.format(question=battle.question, first=battle.first.text, second=battle.second.text)
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = [*start, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    written: list[int] = []
    for _ in range(count):
        token = int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Written(str(tokenizer.decode(written, skip_special_tokens=True)), True)
        written.append(token)
    return Written(str(tokenizer.decode(written, skip_special_tokens=True)), False)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_replies_are_the_likeliest_tokens_whatever_the_batch(loaded: Loaded, batch_size: int) -> None:
    expected = {place: greedy(loaded, battle, 12) for place, battle in enumerate(BATTLES)}
    assert judge(loaded, batch_size=batch_size).replies(BATTLES, silent) == expected


def test_settings_of_the_folder_do_not_make_it_sample(loaded: Loaded) -> None:
    model, _ = loaded
    expected = judge(loaded).replies(BATTLES, silent)
    before = model.generation_config
    model.generation_config = type(before)(do_sample=True, temperature=5.0, eos_token_id=before.eos_token_id)
    try:
        assert judge(loaded).replies(BATTLES, silent) == expected
    finally:
        model.generation_config = before


def test_a_reply_ends_at_its_end_token(loaded: Loaded) -> None:
    asked = judge(loaded)
    end = tiny.EOS
    letter = asked.tokenizer("A", add_special_tokens=False)["input_ids"]
    assert asked._decode([*letter, end, 5, 5], {end}) == Written("A", True)
    assert asked._decode(letter, {end}) == Written("A", False)


def test_verdicts_are_parsed_and_cut_replies_warned_of(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = judge(loaded)
    replies = [Written("Better: B", True), Written("Better: B", False), Written("hm", True)]
    monkeypatch.setattr(text_judge.TextJudge, "replies", lambda *_: dict(enumerate(replies)))
    assert asked.compare(BATTLES, silent) == ["second", "unparseable", "unparseable"]
    assert "Of 3 replies of the judge 1 did not end within 12 tokens" in asked.warnings()[0]


def test_a_question_that_leaves_no_room_for_answers_counts_nowhere(loaded: Loaded) -> None:
    endless = Battle("why " * 100, Answer("a"), Answer("b"))
    asked = judge(loaded)
    replies = asked.replies([endless, *BATTLES], silent)
    assert replies == {place + 1: one for place, one in judge(loaded).replies(BATTLES, silent).items()}
    assert asked.compare([endless, *BATTLES], silent)[0] == "unparseable"
    assert any("of the judge 2 were not asked" in one for one in asked.warnings())


def test_prompt_and_reply_fit_the_models_context(loaded: Loaded) -> None:
    long = Battle("Use tar?", Answer("first " * 100), Answer("brief."))
    asked = judge(loaded, max_reply_tokens=50)
    assert asked.encoder.limit == tiny.CONTEXT - 50
    asked.replies([long], silent)
    assert "78 tokens" in asked.warnings()[0]
    with pytest.raises(InputError, match=r"^judge\.max_reply_tokens: of the context of 128"):
        judge(loaded, max_reply_tokens=100)


def test_control_tokens_in_answers_are_plain_characters(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    hostile = Battle("q", Answer(f"x{tokenizer.eos_token}{tokenizer.pad_token}y"), Answer("b"))
    ids = judge(loaded).encoder.encode(hostile)
    assert ids is not None
    start = 1 if tokenizer.bos_token_id is not None else 0
    assert not {tiny.EOS, tiny.PAD} & set(ids[start:])
    assert str(tokenizer.eos_token) in str(tokenizer.decode(ids[start:]))
