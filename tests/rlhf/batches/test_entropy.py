"""Test the entropy of answer tokens: by hand, against torch.distributions, and its gradient."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from tasks.rlhf.batches import entropy, sequences
from tests.support import tiny


def head_of(logits: Tensor) -> tuple[Tensor, nn.Linear]:
    """Return hidden states and a head that have these logits (N, V)."""
    head = nn.Linear(logits.shape[1], logits.shape[1], bias=False, dtype=logits.dtype)
    with torch.no_grad():
        head.weight.copy_(torch.eye(logits.shape[1], dtype=logits.dtype))
    head.requires_grad_(False)
    return logits, head


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([0.25] * 4, math.log(4)),
        ([0.75, 0.25], 0.5623351446),
        ([0.5, 0.25, 0.125, 0.125], 1.75 * math.log(2)),
        ([1.0, 0.0], 0.0),
    ],
)
def test_entropies_computed_by_hand(probabilities: list[float], expected: float) -> None:
    hidden, head = head_of(torch.tensor([probabilities]).log())
    hidden = torch.where(hidden.isinf(), -1e4, hidden)
    logp, nats = entropy.at_targets(hidden, head, torch.tensor([0]))
    assert nats.item() == pytest.approx(expected, abs=1e-6)
    assert logp.item() == pytest.approx(math.log(probabilities[0]), abs=1e-6)


def test_it_is_that_of_torchs_distribution_whatever_the_chunks() -> None:
    torch.manual_seed(0)
    hidden, head = head_of(3 * torch.randn(11, 17))
    targets = torch.randint(17, (11,))
    for temperature in (0.5, 1.0, 2.0):
        expected = Categorical(logits=hidden / temperature)
        for chunk in (1, 4, 11):
            logp, nats = entropy.at_targets(hidden, head, targets, temperature=temperature, chunk=chunk)
            torch.testing.assert_close(nats, expected.entropy())
            torch.testing.assert_close(logp, expected.log_prob(targets))


def test_its_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    hidden, head = head_of(torch.randn(5, 7, dtype=torch.float64))
    targets = torch.randint(7, (5,))

    def of(logits: Tensor) -> tuple[Tensor, Tensor]:
        return entropy.at_targets(logits, head, targets, temperature=0.7, chunk=2)

    assert torch.autograd.gradcheck(of, hidden.requires_grad_(True))


def test_a_shift_of_all_logits_changes_nothing_and_a_token_that_cannot_be_drawn_is_no_nan() -> None:
    hidden, head = head_of(torch.tensor([[1.0, 2.0, -2e38]]).requires_grad_(True))
    nats = entropy.at_targets(hidden, head, torch.tensor([1]))[1]
    nats.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    moved = entropy.at_targets(hidden.detach() + 3, head, torch.tensor([1]))[1]
    torch.testing.assert_close(moved, nats.detach())


def test_of_a_padded_batch_it_is_that_of_each_row_alone() -> None:
    model = tiny.model()
    prompts, answers = [[5, 6, 7], [8, 9]], [[10, 11], [12, 13, 14, 15, 16]]
    batch = sequences.join(prompts, answers, pad_id=0, device=tiny.CPU)
    logp, nats = entropy.log_probs_and_entropy(model, batch, temperature=0.8)
    torch.testing.assert_close(logp, sequences.log_probs(model, batch, temperature=0.8))
    assert (nats[~batch.response_mask] == 0).all()
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8
        torch.testing.assert_close(
            nats[row][batch.response_mask[row]], Categorical(logits=logits).entropy(), atol=1e-5, rtol=1e-5
        )
