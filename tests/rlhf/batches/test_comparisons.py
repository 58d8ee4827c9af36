"""Test comparisons grouped by question: every answer once, all pairs, the best answers."""

import pytest

from tasks.rlhf.batches import comparisons
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.truncation import Encoder
from tests.support import tiny

ROWS = [
    {
        "question_id": 7,
        "prompt": "list files",
        "chosen": "show",
        "rejected": "copy",
        "gap": 1.0,
        "chosen_older": True,
    },
    {
        "question_id": 3,
        "prompt": "find ports",
        "chosen": "sort",
        "rejected": "hide",
        "gap": 2.0,
        "chosen_older": None,
    },
    {
        "question_id": 7,
        "prompt": "list files",
        "chosen": "show",
        "rejected": "move",
        "gap": 3.0,
        "chosen_older": False,
    },
    {
        "question_id": 7,
        "prompt": "list files",
        "chosen": "copy",
        "rejected": "move",
        "gap": 2.0,
        "chosen_older": False,
    },
]


def encoded() -> list[Comparison]:
    encoder = Encoder(
        tiny.tokenizer(), template="question-answer", max_prompt_tokens=32, max_answer_tokens=16
    )
    return comparisons.encode_with(encoder, comparisons.from_pairs(ROWS))


def test_an_answer_is_there_once_however_many_pairs_it_is_in() -> None:
    first, second = encoded()
    assert (first.question_id, second.question_id) == (7, 3)
    assert first.pairs == [(0, 1), (0, 2), (1, 2)]
    assert len(first.answers) == 3
    assert all(answer[-1] == tiny.EOS for answer in first.answers)


@pytest.mark.parametrize(
    ("pairs", "best"),
    [([(0, 1), (0, 2), (1, 2)], [0]), ([(0, 1), (2, 1)], [0, 2]), ([(0, 1), (1, 0)], [])],
    ids=["one", "two that were never compared", "equal texts with different votes"],
)
def test_the_best_answers_are_chosen_and_never_rejected(
    pairs: list[tuple[int, int]], best: list[int]
) -> None:
    assert (
        Comparison(1, [5], [[6, 1], [7, 1], [8, 1]], pairs, [1.0] * len(pairs), [None] * len(pairs)).best
        == best
    )


def test_rows_of_a_batch_are_counted_over_its_questions() -> None:
    batch = comparisons.collate(encoded(), pad_id=tiny.PAD, device=tiny.CPU, hidden_size=tiny.WIDTH)
    assert len(batch.inputs.ends) == 5
    assert (batch.chosen.tolist(), batch.rejected.tolist(), batch.best.tolist()) == (
        [0, 0, 1, 3],
        [1, 2, 2, 4],
        [0, 3],
    )


@pytest.mark.parametrize(("most", "sizes"), [(0, [2]), (1, [1, 1]), (4, [1, 1]), (5, [2])])
def test_questions_are_not_torn_apart(most: int, sizes: list[int]) -> None:
    assert [len(part) for part in comparisons.micro_batches(encoded(), most)] == sizes


def test_held_out_questions_are_the_same_whatever_else_is_there() -> None:
    training, held = comparisons.hold_out(range(400), share=0.1, seed=3)
    assert 20 < len(held) < 60
    assert sorted(training + held) == list(range(400))
    _, fewer = comparisons.hold_out(range(200), share=0.1, seed=3)
    assert fewer == [id for id in held if id < 200]
    assert [len(part) for part in comparisons.hold_out([0, 1], share=1e-4, seed=0)] == [1, 1]
