"""Test that answers that share a prompt get the values and gradients of each alone, on every architecture."""

import random

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.rlhf.batches import attention_masks, sequences, shared_prompt
from tasks.rlhf.models import lora
from tests.support import tiny

Question = tuple[list[int], list[list[int]]]


def questions(num: int = 7, *, seed: int = 0) -> list[Question]:
    """Return prompts and answers of many lengths; an answer may be its end token alone."""
    rng = random.Random(seed)

    def ids(most: int) -> list[int]:
        return [rng.randrange(2, tiny.VOCABULARY) for _ in range(rng.randint(0, most))]

    return [([5, *ids(9)], [[*ids(8), tiny.EOS] for _ in range(rng.randint(1, 5))]) for _ in range(num)]


def shared(asked: list[Question], *, hidden_size: int = tiny.WIDTH) -> shared_prompt.SharedPromptBatch:
    return shared_prompt.join(asked, pad_id=tiny.PAD, device=tiny.CPU, hidden_size=hidden_size)


def apart(asked: list[Question]) -> sequences.Sequences:
    """Return every answer behind its own copy of the prompt."""
    rows = [(prompt, answer) for prompt, answers in asked for answer in answers]
    return sequences.join([p for p, _ in rows], [a for _, a in rows], pad_id=tiny.PAD, device=tiny.CPU)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_scores_and_log_probs_are_those_of_each_answer_alone(kind: str) -> None:
    model, asked = tiny.model(kind), questions()
    head = lora.new_head(tiny.WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(
            shared_prompt.scores(model, head, shared(asked)),
            sequences.scores(model, head, apart(asked)),
            atol=1e-4,
            rtol=1e-4,
        )
        alone = sequences.log_probs(model, apart(asked)).sum(dim=1)
        torch.testing.assert_close(shared_prompt.log_probs(model, shared(asked)), alone, atol=1e-3, rtol=1e-4)


def test_gradients_are_those_of_each_answer_alone() -> None:
    model, asked = tiny.model(), questions()
    weights = torch.arange(1.0, 1 + len(apart(asked).input_ids))

    def gradients(values: Tensor) -> list[Tensor]:
        return list(
            torch.autograd.grad((values * weights).sum(), [p for p in model.parameters() if p.requires_grad])
        )

    model.requires_grad_(True)
    ours = gradients(shared_prompt.log_probs(model, shared(asked)))
    for mine, theirs in zip(
        ours, gradients(sequences.log_probs(model, apart(asked)).sum(dim=1)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-3)


def test_no_answer_sees_another_and_no_question_another() -> None:
    model, asked = tiny.model(), questions()
    before = answer_values(model, shared(asked))
    changed = [*asked]
    prompt, answers = changed[2]
    changed[2] = (prompt, [[*(9 for _ in answers[0][:-1]), tiny.EOS], *answers[1:]])
    after, first = answer_values(model, shared(changed)), sum(len(answers) for _, answers in asked[:2])
    assert not torch.allclose(before[first], after[first], atol=1e-3)
    others = torch.arange(len(before)) != first
    assert torch.equal(before[others], after[others])


@torch.no_grad()
def answer_values(model: PreTrainedModel, batch: shared_prompt.SharedPromptBatch) -> Tensor:
    head = nn.Linear(tiny.WIDTH, 1, bias=False)
    nn.init.ones_(head.weight)
    return shared_prompt.scores(model, head, batch)


def test_the_prompt_is_there_once_and_places_say_where_everything_is() -> None:
    batch = shared([([5, 6], [[7, 8, 1], [9, 1]]), ([10], [[1]])])
    (rows,) = batch.groups
    assert rows.input_ids.tolist() == [[5, 6, 7, 8, 1, 9, 1], [10, 1, 0, 0, 0, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 0, 0, 0, 0, 0]]
    assert rows.answer.tolist() == [[-1, -1, 0, 0, 0, 1, 1], [-1, 2, -1, -1, -1, -1, -1]]
    assert (batch.targets.tolist(), batch.before.tolist()) == ([7, 8, 1, 9, 1, 1], [1, 2, 3, 1, 5, 7])
    assert (batch.owner.tolist(), batch.ends.tolist()) == ([0, 0, 0, 1, 1, 2], [4, 6, 8])
    assert shared_prompt.num_tokens(batch).tolist() == [3, 2, 1]


def test_short_questions_share_a_row_and_answers_keep_their_order() -> None:
    asked: list[Question] = [([5], [[6, 1]]), ([7, 8, 9], [[10, 11, 1], [12, 1]]), ([13, 14], [[1]])]
    batch = shared(asked)
    (rows,) = batch.groups
    assert rows.input_ids.shape == (2, 8)
    assert rows.question[0].tolist() == [0, 0, 0, 2, 2, 2, -1, -1]
    flat = rows.input_ids.flatten()
    assert flat[batch.ends].tolist() == [1, 1, 1, 1]
    assert flat[batch.before].tolist() == [5, 6, 9, 10, 11, 9, 12, 14]


def test_a_question_of_many_answers_is_there_again() -> None:
    asked: list[Question] = [([5, 6], [[7, 8, 9, 1]] * 7 + [[10, 1]])]
    assert shared(asked, hidden_size=1).groups[0].input_ids.shape == (
        8,
        6,
    )  # a narrow model: attention would cost more than the prompts
    batch = shared(asked)
    assert batch.groups[0].input_ids.shape == (
        2,
        22,
    )  # 4 x (2 + 4) would be 24: five answers fit, and three with the prompt again
    assert (batch.groups[0].input_ids == 5).sum() == 2
    assert shared_prompt.num_tokens(batch).tolist() == [4] * 7 + [2]
    model, head = tiny.model(), lora.new_head(tiny.WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(
            shared_prompt.scores(model, head, batch),
            sequences.scores(model, head, apart(asked)),
            atol=1e-4,
            rtol=1e-4,
        )


def test_questions_of_very_different_lengths_are_computed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = [
        ([5, *[6] * (90 if i % 2 else 5)], [[*[7] * (20 if i % 2 else 3), 1], [8, 1]]) for i in range(8)
    ]
    batch = shared(asked)
    assert [tuple(rows.input_ids.shape) for rows in batch.groups] == [(4, 114), (4, 12)]
    places = sum(rows.input_ids.numel() for rows in batch.groups)
    needed = sum(len(prompt) + sum(map(len, answers)) for prompt, answers in asked)
    assert places < 1.1 * needed
    monkeypatch.setattr(shared_prompt, "CALL_COST", 1000)  # a call that costs more than all the padding
    assert len(shared(asked).groups) == 1
    model, head = tiny.model(), lora.new_head(tiny.WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(
            shared_prompt.scores(model, head, batch),
            sequences.scores(model, head, apart(asked)),
            atol=1e-4,
            rtol=1e-4,
        )
        alone = sequences.log_probs(model, apart(asked)).sum(dim=1)
        torch.testing.assert_close(shared_prompt.log_probs(model, batch), alone, atol=1e-3, rtol=1e-4)


def test_a_place_sees_its_own_prompt_and_answer_only() -> None:
    rows = shared([([5, 6], [[7, 1], [8, 1]]), ([9], [[1]])]).groups[0]
    segments = attention_masks.Segments(rows.question, rows.answer)
    mask = attention_masks.build_attention_mask(tiny.model(), segments, rows.position_ids)
    assert isinstance(mask, torch.Tensor)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
