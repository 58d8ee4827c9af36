"""Test truncated importance weights: golden values, and the gradient that they correct."""

import pytest
import torch

from tasks.rlhf.algorithms.importance_weights import importance_weights
from tasks.rlhf.algorithms.losses import ppo_policy_loss


def test_golden_values() -> None:
    difference = torch.tensor([[0.0, 0.1, -0.1, 1.0, -1.0, 5.0]])
    mask = torch.tensor([[True, True, True, True, True, False]])
    weights = importance_weights(difference - 3, torch.full((1, 6), -3.0), mask, most=2.0)
    expected = torch.tensor([[1, 1.105171, 0.904837, 2, 0.367879, 1]])
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_equal_probabilities_weigh_exactly_one() -> None:
    logp = torch.randn(3, 5)
    assert torch.equal(importance_weights(logp, logp, torch.ones(3, 5).bool(), most=1.0), torch.ones(3, 5))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_expected_gradient_is_that_of_the_policys_own_samples(sign: float) -> None:
    # Every token of a vocabulary once, weighted by how often a sampler of another temperature draws it.
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    advantage = sign * torch.rand(7, dtype=torch.float64)[None]
    logp = torch.log_softmax(logits, dim=0)[None]
    old, sampler = logp.detach(), torch.log_softmax(logits.detach() / 0.7, dim=0)[None]
    mask = torch.ones(1, 7, dtype=torch.bool)

    def gradient(often: torch.Tensor, weights: torch.Tensor | float) -> torch.Tensor:
        # the loss is a mean over tokens, so a factor of the advantage is how often a token is drawn
        loss = ppo_policy_loss(
            logp, old, advantage * weights * often, mask, clip_range=0.2, dual_clip=3.0, count=torch.tensor(1)
        ).loss
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
        return found

    expected = gradient(old.exp(), 1.0)
    weights = importance_weights(old, sampler, mask, most=100.0)
    torch.testing.assert_close(gradient(sampler.exp(), weights), expected)
    assert (gradient(sampler.exp(), 1.0) - expected).abs().max() > 0.01
