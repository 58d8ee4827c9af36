"""Log-probabilities, values and scores of answers: against the model's own logits, and untouched by padding and company."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from tasks.rlhf.batches import chunked_log_probs, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.models.lora import new_head
from tests.support import tiny

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [20, 21]]
ANSWERS = [[30, 31, 32, 33, 1], [40, 1], [50, 51, 52, 53, 54, 55, 56, 1], [60]]


def joined(rows: list[int], *, pad_id: int = tiny.PAD) -> Sequences:
    return sequences.join(
        [PROMPTS[r] for r in rows], [ANSWERS[r] for r in rows], pad_id=pad_id, device=tiny.CPU
    )


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.model(request.param)


@pytest.fixture(scope="module")
def head() -> nn.Linear:
    torch.manual_seed(1)
    return new_head(tiny.WIDTH)


def test_a_mask_covers_the_answer_and_its_end() -> None:
    batch = joined([0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 7, 30, 31, 32, 33, 1], [8, 9, 10, 11, 12, 13, 40, 1]]
    assert batch.response_mask.long().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]


def test_chosen_rows_lose_the_columns_that_only_others_needed() -> None:
    some = joined([0, 1, 2, 3]).rows(torch.tensor([3, 0]))
    assert some.input_ids.tolist() == joined([3, 0]).input_ids.tolist()
    assert some.response_mask.tolist() == joined([3, 0]).response_mask.tolist()


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_minus_the_cross_entropy_of_the_logits(
    model: PreTrainedModel, temperature: float
) -> None:
    logp = sequences.log_probs(model, joined([0, 1, 2, 3]), temperature=temperature)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.tensor([prompt + answer])
        mask = torch.ones_like(ids)
        logits = (
            model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, len(prompt) - 1 : -1]
            / temperature
        )
        expected = -F.cross_entropy(logits, torch.tensor(answer), reduction="none")
        torch.testing.assert_close(
            logp[row, len(prompt) : len(prompt) + len(answer)], expected, atol=1e-5, rtol=1e-5
        )
        assert not logp[row, : len(prompt)].any()
        assert not logp[row, len(prompt) + len(answer) :].any()


@torch.no_grad()
def test_chunks_and_gradients_change_nothing(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = joined([0, 1, 2, 3])
    whole = sequences.log_probs(model, batch)
    with monkeypatch.context() as patch:
        patch.setattr(chunked_log_probs, "chunk_rows", lambda *_, **__: 3)
        torch.testing.assert_close(sequences.log_probs(model, batch), whole, atol=1e-6, rtol=0)
    with torch.enable_grad():
        torch.testing.assert_close(sequences.log_probs(model, batch), whole, atol=1e-6, rtol=0)


@torch.no_grad()
def test_padding_content_changes_nothing(model: PreTrainedModel, head: nn.Linear) -> None:
    batch, other = joined([0, 1, 2, 3]), joined([0, 1, 2, 3], pad_id=99)
    assert not torch.equal(batch.input_ids, other.input_ids)
    assert torch.equal(sequences.log_probs(model, batch), sequences.log_probs(model, other))
    assert torch.equal(sequences.values(model, head, batch), sequences.values(model, head, other))
    assert torch.equal(sequences.scores(model, head, batch), sequences.scores(model, head, other))


@torch.no_grad()
def test_company_changes_nothing(model: PreTrainedModel, head: nn.Linear) -> None:
    batch = joined([0, 1, 2, 3])
    logp, values, scores = (
        sequences.log_probs(model, batch),
        sequences.values(model, head, batch),
        sequences.scores(model, head, batch),
    )
    for row in range(4):
        alone = joined([row])
        width = alone.input_ids.shape[1]
        torch.testing.assert_close(
            sequences.log_probs(model, alone)[0], logp[row, :width], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            sequences.values(model, head, alone)[0], values[row, :width], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(sequences.scores(model, head, alone)[0], scores[row], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_score_is_read_at_the_end_token_and_values_before_each_token(
    model: PreTrainedModel, head: nn.Linear
) -> None:
    batch = joined([0, 1, 2, 3])
    scores, values = sequences.scores(model, head, batch), sequences.values(model, head, batch)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        ids = torch.tensor([prompt + answer])
        states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1][0]
        expected = head(states)[:, 0]
        torch.testing.assert_close(scores[row], expected[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            values[row, len(prompt) : len(prompt) + len(answer)],
            expected[len(prompt) - 1 : -1],
            atol=1e-5,
            rtol=1e-5,
        )


def test_scatter_puts_values_back_in_reading_order() -> None:
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]).bool()
    assert sequences.scatter(torch.tensor([1.0, 2.0, 3.0, 4.0]), mask).tolist() == [
        [0, 1, 2, 0],
        [0, 0, 3, 4],
    ]


def many(num_rows: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and answers of 1 to 12 tokens, in no order."""
    lengths = torch.randint(1, 13, (2, num_rows), generator=torch.Generator().manual_seed(3)).tolist()
    ids = iter(
        torch.randint(
            2, tiny.VOCABULARY, (24 * num_rows,), generator=torch.Generator().manual_seed(4)
        ).tolist()
    )
    return tuple([[next(ids) for _ in range(length)] for length in row] for row in lengths)  # type: ignore[return-value]


def test_groups_are_of_like_length_and_hold_every_row_once() -> None:
    prompts, answers = many(80)
    batch = sequences.join(prompts, answers, pad_id=tiny.PAD, device=tiny.CPU)
    groups = sequences.group_by_length(batch)
    assert len(groups) == sequences.MAX_GROUPS
    assert sorted(torch.cat(groups).tolist()) == list(range(80))
    lengths = [[len(prompts[r]) + len(answers[r]) for r in rows.tolist()] for rows in groups]
    assert all(max(shorter) <= min(longer) for shorter, longer in pairwise(lengths))
    assert [len(sequences.group_by_length(batch.rows(torch.arange(n)))) for n in (1, 31, 32)] == [1, 1, 2]


@torch.no_grad()
def test_every_row_of_a_large_batch_is_what_it_is_alone(model: PreTrainedModel, head: nn.Linear) -> None:
    prompts, answers = many(40)
    batch = sequences.join(prompts, answers, pad_id=tiny.PAD, device=tiny.CPU)
    logp, value, score = (
        sequences.log_probs(model, batch),
        sequences.values(model, head, batch),
        sequences.scores(model, head, batch),
    )
    assert logp.shape == value.shape == batch.input_ids.shape
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone, width = (
            sequences.join([prompt], [answer], pad_id=tiny.PAD, device=tiny.CPU),
            len(prompt) + len(answer),
        )
        torch.testing.assert_close(
            logp[row, :width], sequences.log_probs(model, alone)[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            value[row, :width], sequences.values(model, head, alone)[0], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(score[row], sequences.scores(model, head, alone)[0], atol=1e-5, rtol=1e-5)
        assert not logp[row, width:].any()
