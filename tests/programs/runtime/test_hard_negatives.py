"""Test comparisons made without people: what is added to the reward model's questions, and what never is."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.config.sections.reward import HardNegatives
from tasks.programs.token_tables import hard_negatives
from tasks.programs.token_tables.hard_negatives import Hardened, add_hard_negatives
from tasks.programs.token_tables.questions import decode, hold_out, text_lengths, to_batch
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.truncation import Encoder
from tests.support import tiny

TOKENIZER = tiny.tokenizer()
KINDS = ("unrelated", "wrong_name", "truncated", "repeated")


def encoder(most: int = 40) -> Encoder:
    return Encoder(TOKENIZER, template="question-answer", max_prompt_tokens=60, max_answer_tokens=most)


def rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Return pairs of questions, each with two good answers and a bad one, whose names are numbers."""
    found = []
    for id in range(first, first + count):
        common = {"question_id": id, "prompt": f"list disks {id + 100}", "gap": 2.0, "chosen_older": True}
        for good in (f"Use list {id + 100}.", f"Try list {id + 100}, and print."):
            found.append(common | {"chosen": good, "rejected": "hide words"})
    return found


def encode(some: Sequence[dict[str, Any]], *, most: int = 40) -> list[Comparison]:
    return comparisons.encode_with(encoder(most), comparisons.from_pairs(some))


def table(items: Sequence[Comparison], size: int = 1000) -> TokenTable[Comparison]:
    """Return a table of these questions in batches of some size, as several ranks write them."""
    batches = [to_batch(items[start : start + size]) for start in range(0, len(items), size)]
    return TokenTable(batches, decode)


def harden(items: Sequence[Comparison], *, seed: int = 0, most: int = 40, **changed: Any) -> Hardened:
    return add_hard_negatives(table(items), encoder(most), HardNegatives(**changed), seed=seed)


def added(
    before: Sequence[Comparison], after: Sequence[Comparison]
) -> dict[int, list[tuple[list[int], list[int]]]]:
    """Return the pairs of token ids (chosen, rejected) that were added to each question."""
    return {
        old.question_id: [(new.answers[w], new.answers[x]) for w, x in new.pairs[len(old.pairs) :]]
        for old, new in zip(before, after, strict=True)
    }


def text(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


# ------------------------------------------------------------------------------------------ by hand


def test_what_is_made_of_two_questions_by_hand() -> None:
    items = encode(
        [
            {"question_id": 1, "prompt": "copy 20", "chosen": "copy 20 now", "rejected": "hide", "gap": 3.0,
             "chosen_older": True},
            {"question_id": 2, "prompt": "show 5", "chosen": "show 5", "rejected": "hide", "gap": 3.0,
             "chosen_older": None},
        ]
    )  # fmt: skip
    found, made = harden(items, share=4)
    assert made == dict.fromkeys(KINDS, 2)
    [first, second] = found
    body = items[0].answers[0][:-1]
    swapped = (
        {text(ids) for _, ids in added(items, [first, second])[1]}
        - {
            text(items[1].answers[0]),  # unrelated
            text([*body[: -(-len(body) // 3)], tiny.EOS]),  # truncated
            " copy 20 now copy 20 now" + text([tiny.EOS]),  # repeated
        }
    )
    # copy and 20 are names of the question: copy for show, or 20 for 5
    assert len(swapped) == 1
    assert swapped < {f" {one}{text([tiny.EOS])}" for one in ("show 20 now", "copy 5 now")}
    assert first.pairs == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]
    assert (first.gaps, first.older) == ([3.0, 1, 1, 1, 1], [True, None, None, None, None])
    assert (first.question_id, first.prompt, first.answers[:2]) == (1, items[0].prompt, items[0].answers)
    assert text_lengths(found).tolist() == [
        len(one.prompt) + sum(map(len, one.answers)) for one in (first, second)
    ]


def test_a_share_of_nothing_is_the_same_table() -> None:
    questions = table(encode(rows(3)))
    found = add_hard_negatives(questions, encoder(), HardNegatives(), seed=0)
    assert found.questions is questions
    assert set(found.made.values()) == {0}


# ---------------------------------------------------------------------------------- what always holds


@pytest.mark.parametrize("seed", range(3))
def test_a_made_answer_always_loses_and_differs_from_the_real_ones(seed: int) -> None:
    items = encode(rows(60))
    found, made = harden(items, seed=seed, share=2.5)
    for old, new in zip(items, found, strict=True):
        count = len(old.answers)
        assert (new.answers[:count], new.pairs[: len(old.pairs)]) == (old.answers, old.pairs)
        assert (new.gaps[: len(old.pairs)], new.older[: len(old.pairs)]) == (old.gaps, old.older)
        assert all(
            chosen in old.best and rejected >= count for chosen, rejected in new.pairs[len(old.pairs) :]
        )
        assert new.best == old.best
        assert len({tuple(ids) for ids in new.answers}) == len(new.answers)
        assert {rejected for _, rejected in new.pairs} >= {*range(count, len(new.answers))}
        for ids in new.answers[count:]:
            assert len(ids) <= 40
            assert ids.index(tiny.EOS) == len(ids) - 1
    assert sum(made.values()) == sum(len(pairs) for pairs in added(items, list(found)).values())


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_order_of_rows_and_the_parts_of_a_table_change_nothing(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = encode(rows(40))
    wanted = {one.question_id: one for one in harden(items, share=1.5).questions}
    monkeypatch.setattr(hard_negatives, "BATCH_QUESTIONS", batch)
    shuffled = random.Random(batch).sample(items, len(items))
    settings = HardNegatives(share=1.5, kinds=KINDS[::-1])
    found = add_hard_negatives(table(shuffled, batch), encoder(), settings, seed=0).questions
    assert [one.question_id for one in found] == [one.question_id for one in shuffled]
    assert {one.question_id: one for one in found} == wanted
    whole = table(items)
    again = add_hard_negatives(whole.select([*range(39, -1, -1)]), encoder(), settings, seed=0).questions
    assert list(again)[::-1] == list(wanted.values())


def test_the_order_of_a_questions_answers_changes_nothing() -> None:
    items, turned = (encode(some) for some in (rows(30), rows(30)[::-1]))
    turned = turned[::-1]
    assert [one.answers for one in items] != [one.answers for one in turned]
    found = [added(some, list(harden(some, share=4).questions)) for some in (items, turned)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("share", "kinds"),
    [(0.5, ["truncated"]), (1, ["truncated", "repeated"]), (1, ["unrelated"]), (1, ["wrong_name"])],
    ids=["which questions", "which kinds", "whose answer", "which name"],
)
def test_other_seeds_make_others(share: float, kinds: list[str]) -> None:
    items = encode(rows(30))
    first, again, other = (
        list(harden(items, share=share, kinds=kinds, seed=seed).questions) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_held_out_questions_and_their_answers_stay_out() -> None:
    training, held_out = hold_out(table(encode(rows(60))), share=0.5, seed=0)
    before = list(held_out)
    found = add_hard_negatives(training, encoder(), HardNegatives(share=4), seed=0).questions
    assert list(held_out) == before
    hidden = {tuple(ids) for one in held_out for ids in one.answers} - {
        tuple(ids) for one in training for ids in one.answers
    }
    made = {tuple(bad) for pairs in added(list(training), list(found)).values() for _, bad in pairs}
    assert hidden
    assert not hidden & made


# -------------------------------------------------------------------------------- how many, and which


@pytest.mark.parametrize(("share", "low", "high"), [(0.25, 80, 120), (1, 400, 400), (2.5, 960, 1040)])
def test_the_share_is_kept(share: float, low: int, high: int) -> None:
    """400 questions of which all kinds can be made; the bounds are over two deviations away."""
    found = harden(encode(rows(400)), share=share)
    assert low <= sum(found.made.values()) <= high
    counts = {len(one.pairs) - 2 for one in found.questions}
    assert counts == {int(share), -int(-share // 1)}
    if share >= 1:
        assert all(count > 400 * share / 4 * 0.7 for count in found.made.values())


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_named_kinds_are_made(kind: str) -> None:
    items = encode(rows(20))
    found = harden(items, share=1, kinds=[kind])
    assert found.made == {kind: 20}
    real = {tuple(one.answers[best]) for one in items for best in one.best}
    for pairs in added(items, list(found.questions)).values():
        [(chosen, rejected)] = pairs
        assert kind != "unrelated" or tuple(rejected) in real
        assert (rejected[:-1] == chosen[:-1] * 2) == (kind == "repeated")
        assert (rejected[:-1] == chosen[: len(rejected) - 1]) == (kind == "truncated")


def test_what_cannot_be_made_is_left_out() -> None:
    alone = encode(rows(1))
    assert harden(alone, share=1, kinds=["unrelated"]).made == {"unrelated": 0}
    cut = encode(rows(4), most=4)  # all answers lose their end tokens
    assert all(ids[-1] != tiny.EOS for one in cut for ids in one.answers)
    found = harden(cut, most=4, share=4)
    assert (list(found.questions), set(found.made.values())) == (cut, {0})
    [one] = encode(rows(1))
    longest = 2 * len(min(one.answers[best] for best in one.best)) - 1  # a text said twice with one end token
    assert harden([one], most=longest, share=1, kinds=["repeated"]).made == {"repeated": 1}
    assert harden([one], most=longest - 1, share=1, kinds=["repeated"]).made == {"repeated": 0}


def test_what_is_equal_to_a_real_answer_is_left_out() -> None:
    short = Comparison(1, [5], [[6, tiny.EOS], [6, 6, tiny.EOS]], [(0, 1)], [1.0], [None])
    found = harden([short], share=2, kinds=["truncated", "repeated"])
    assert (list(found.questions), found.made) == ([short], {"truncated": 0, "repeated": 0})


def test_questions_that_ask_the_same_give_each_other_no_answers() -> None:
    twins = encode([row | {"question_id": id, "chosen": f"copy {id}"} for id in (1, 2) for row in rows(1)])
    assert harden(twins, share=1, kinds=["unrelated"]).made == {"unrelated": 0}


def test_a_kind_that_cannot_be_made_leaves_its_place_to_the_others() -> None:
    for id in range(8):  # whichever kind is drawn first
        found = harden(encode(rows(1, first=id)), share=1, kinds=["unrelated", "truncated"])
        assert found.made == {"unrelated": 0, "truncated": 1}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"share": 3, "kinds": ["unrelated", "repeated"]}, "set share to 2 or less, or name more kinds"),
        ({"kinds": ["repeated", "repeated"]}, "name each of kinds once"),
        ({"share": -1}, "greater than or equal to 0"),
        ({"kinds": []}, "at least 1 item"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        HardNegatives(**changed)
