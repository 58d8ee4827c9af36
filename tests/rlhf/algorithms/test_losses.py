"""Test losses against numbers computed by hand, invariants, and torch's own functions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tasks.rlhf.algorithms.losses import (
    centring_penalty,
    dpo_loss,
    ipo_loss,
    kl_loss,
    masked_mean,
    pairwise_loss,
    perplexity,
    ppo_policy_loss,
    ppo_value_loss,
)

ONE = torch.ones(1, 1, dtype=torch.bool)


def scalar(value: float) -> Tensor:
    return torch.tensor([[value]])


# ------------------------------------------------------------------------------------- reward model


def test_pair_losses_of_four_ranked_rewards() -> None:
    rewards = torch.tensor([2.0, 1.0, 0.5, -1.0])
    chosen, rejected = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([1, 2, 3, 2, 3, 3])
    loss = pairwise_loss(rewards[chosen], rewards[rejected])
    expected = torch.tensor([0.31326, 0.20141, 0.04859, 0.47408, 0.12693, 0.20141])
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert loss.mean().item() == pytest.approx(0.2276134, abs=1e-6)  # the K-wise loss, K = 4


def test_pairwise_loss_of_equal_rewards_is_log_two() -> None:
    assert pairwise_loss(torch.tensor([3.0]), torch.tensor([3.0])).item() == pytest.approx(0.693147, abs=1e-6)


def test_pairwise_loss_survives_large_margins() -> None:
    loss = pairwise_loss(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]))
    assert loss.tolist() == [1000.0, 0.0]


def test_a_margin_is_taken_off_the_difference() -> None:
    chosen, rejected = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
    assert pairwise_loss(chosen, rejected, torch.tensor([0.0, 1.0])).tolist() == pytest.approx(
        [0.313262, 0.693147], abs=1e-6
    )


def test_centring_is_the_squared_sum() -> None:
    assert centring_penalty(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 2.0])).tolist() == [9.0, 0.0]


@pytest.mark.parametrize("shape", [(3, 1), (1, 3)])
def test_pairwise_loss_refuses_what_would_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        pairwise_loss(torch.zeros(shape), torch.zeros(3))


# ---------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"), [(1, 1.5, -1.2), (1, 0.5, -0.5), (-1, 1.5, 1.5), (-1, 0.5, 0.8)]
)
def test_policy_clip(advantage: float, ratio: float, expected: float) -> None:
    result = ppo_policy_loss(scalar(math.log(ratio)), scalar(0.0), scalar(advantage), ONE, clip_range=0.2)
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)
    assert result.clip_fraction.item() == float((advantage > 0) == (ratio > 1))
    assert result.ratio.item() == pytest.approx(ratio, abs=1e-6)
    assert result.approx_kl.item() == pytest.approx(math.log(ratio) ** 2 / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected"),
    [(-1, 10, 3.0), (-2, 10, 6.0), (-1, 1.5, 1.5), (-1, 0.5, 0.8), (1, 10, -1.2), (1, 0.5, -0.5)],
)
def test_dual_clip_bounds_negative_advantages_only(advantage: float, ratio: float, expected: float) -> None:
    result = ppo_policy_loss(
        scalar(math.log(ratio)), scalar(0.0), scalar(advantage), ONE, clip_range=0.2, dual_clip=3.0
    )
    assert result.loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [(1, 1.5, False), (1, 0.5, True), (-1, 1.5, True), (-1, 0.5, False), (-1, 10, False)],
)
def test_clipped_tokens_have_no_gradient(advantage: float, ratio: float, moves: bool) -> None:
    logp = scalar(math.log(ratio)).requires_grad_(True)
    ppo_policy_loss(logp, scalar(0.0), scalar(advantage), ONE, clip_range=0.2, dual_clip=3.0).loss.backward()
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-5)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8))
def test_at_ratio_one_the_policy_loss_is_minus_the_mean_advantage(advantages: list[float]) -> None:
    a = torch.tensor([advantages])
    logp = torch.full_like(a, -1.3)
    result = ppo_policy_loss(
        logp, logp, a, torch.ones_like(a, dtype=torch.bool), clip_range=0.2, dual_clip=3.0
    )
    assert result.loss.item() == pytest.approx(-sum(advantages) / len(advantages), abs=1e-5)
    assert (result.ratio.item(), result.clip_fraction.item(), result.approx_kl.item()) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("old", "value", "target", "expected"), [(0, 0.5, 1, 0.32), (0, 0.5, -1, 1.125), (0, 0.1, 1, 0.405)]
)
def test_value_clip(old: float, value: float, target: float, expected: float) -> None:
    result = ppo_value_loss(scalar(value), scalar(old), scalar(target), ONE, clip_range=0.2)
    assert result.loss.item() == pytest.approx(expected, abs=1e-6)
    assert result.clip_fraction.item() == float(expected == 0.32)


def test_padding_content_changes_neither_losses_nor_statistics_nor_gradients() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    tensors = [torch.randn(2, 4) for _ in range(3)]
    outcomes = []
    for filler in (0.0, 1e4, -1e4):
        new, old, target = (
            torch.where(mask, x, sign * filler) for x, sign in zip(tensors, (1, -1, 1), strict=True)
        )
        new = new.clone().requires_grad_(True)
        policy = ppo_policy_loss(new, old, target, mask, clip_range=0.2, dual_clip=3.0)
        value = ppo_value_loss(new, old, target, mask, clip_range=0.2)
        (gradient,) = torch.autograd.grad(policy.loss + value.loss, new)
        outcomes.append(torch.cat([torch.stack([*policy, *value]).detach(), gradient.flatten()]))
    assert outcomes[0].isfinite().all()
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


def test_parts_with_the_whole_count_add_up_to_the_whole() -> None:
    torch.manual_seed(1)
    mask = torch.rand(6, 5) < 0.6
    mask[:, 2] = True
    new, old, a, v, old_v, target = (0.3 * torch.randn(6, 5) for _ in range(6))
    whole = [
        *ppo_policy_loss(new, old, a, mask, clip_range=0.2),
        *ppo_value_loss(v, old_v, target, mask, clip_range=0.2),
    ]
    parts = [
        [
            *ppo_policy_loss(new[r], old[r], a[r], mask[r], clip_range=0.2, count=mask.sum()),
            *ppo_value_loss(v[r], old_v[r], target[r], mask[r], clip_range=0.2, count=mask.sum()),
        ]
        for r in torch.arange(6).split(1)
    ]
    torch.testing.assert_close(torch.stack([torch.stack(p) for p in parts]).sum(dim=0), torch.stack(whole))


def test_masked_mean_ignores_infinities_outside_the_mask() -> None:
    values = torch.tensor([1.0, math.inf, 4.0], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, True]))
    assert mean.item() == 2.5
    assert torch.autograd.grad(mean, values)[0].tolist() == [0.5, 0.0, 0.5]


# ---------------------------------------------------------------------------------------------- DPO


def dpo(chosen: float, rejected: float, **settings: float) -> float:
    """Return the loss if the policy moved the chosen answer by ``chosen`` nats and the rejected one by
    ``rejected``.
    """
    beta = settings.pop("beta", 0.1)
    result = dpo_loss(
        torch.tensor([chosen - 9]),
        torch.tensor([rejected - 7]),
        torch.tensor([-9.0]),
        torch.tensor([-7.0]),
        beta=beta,
        **settings,
    )
    assert result.chosen_reward.item() == pytest.approx(beta * chosen, abs=1e-6)
    assert result.rejected_reward.item() == pytest.approx(beta * rejected, abs=1e-6)
    return result.loss.item()


def test_dpo_by_hand() -> None:
    assert dpo(0, 0) == pytest.approx(0.693147, abs=1e-6)
    assert dpo(2, -3) == pytest.approx(0.474077, abs=1e-5)  # -log sigmoid(.5)
    assert dpo(-3, 2) == pytest.approx(0.974077, abs=1e-5)
    assert dpo(4, 4) == pytest.approx(0.693147, abs=1e-5)


def test_label_smoothing_mixes_in_the_swapped_pair() -> None:
    assert dpo(2, -3, smoothing=0.25) == pytest.approx(0.75 * 0.474077 + 0.25 * 0.974077, abs=1e-5)


def test_dpo_gradient_at_the_start_is_half_beta() -> None:
    chosen, rejected = (torch.tensor([-5.0], requires_grad=True) for _ in range(2))
    dpo_loss(chosen, rejected, torch.tensor([-5.0]), torch.tensor([-5.0]), beta=0.1).loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.05, 0.05))


def test_dpo_rewards_carry_no_gradient() -> None:
    x = torch.zeros(2, requires_grad=True)
    result = dpo_loss(x, x, x.detach(), x.detach(), beta=0.1)
    assert not result.chosen_reward.requires_grad
    assert not result.rejected_reward.requires_grad


@pytest.mark.parametrize(
    ("chosen", "rejected", "beta", "expected"),
    [(0, 0, 0.1, 25.0), (2, -3, 0.1, 0.0), (1, 0, 0.5, 0.0), (-3, 2, 0.5, 36.0)],
)
def test_ipo_by_hand(chosen: float, rejected: float, beta: float, expected: float) -> None:
    """(h - 1 / (2 beta))^2 if the policy moved the answers by so many nats."""
    result = ipo_loss(
        torch.tensor([chosen - 9.0]),
        torch.tensor([rejected - 7.0]),
        torch.tensor([-9.0]),
        torch.tensor([-7.0]),
        beta=beta,
    )
    assert result.loss.item() == pytest.approx(expected, abs=1e-4)
    assert (result.chosen_reward.item(), result.rejected_reward.item()) == pytest.approx(
        (beta * chosen, beta * rejected)
    )


def test_ipo_pulls_back_what_is_further_apart_than_it_asks_for() -> None:
    for start, towards in ((2.0, -1), (8.0, 1)):  # 1 / (2 beta) = 5
        chosen = torch.tensor([start], requires_grad=True)
        ipo_loss(chosen, torch.zeros(1), torch.zeros(1), torch.zeros(1), beta=0.1).loss.sum().backward()
        assert chosen.grad is not None
        assert chosen.grad.sign().item() == towards


# --------------------------------------------------------------------------------------------- text


def test_perplexity() -> None:
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


@pytest.mark.parametrize("log_ratio", [60.0, 89.0, 500.0, 1e30])
@pytest.mark.parametrize("advantage", [2.0, 0.0, -2.0])
@pytest.mark.parametrize("dual_clip", [3.0, 50.0])
def test_a_ratio_that_overflows_is_a_ratio_behind_its_clip(
    log_ratio: float, advantage: float, dual_clip: float
) -> None:
    """In exact arithmetic the loss does not depend on rho there; compared with one that float32 can hold."""

    def loss_of(first: float) -> tuple[list[float], list[float]]:
        logp = torch.tensor([[first, 0.1]], requires_grad=True)
        mask, advantages = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[advantage, 1.0]])
        found = ppo_policy_loss(
            logp, torch.zeros(1, 2), advantages, mask, clip_range=0.2, dual_clip=dual_clip
        )
        found.loss.backward()
        assert logp.grad is not None
        return [found.loss.item(), found.clip_fraction.item()], logp.grad[0].tolist()

    assert loss_of(log_ratio) == loss_of(20.0)
    assert loss_of(log_ratio)[1][0] == 0.0
    assert loss_of(log_ratio)[1][1] == pytest.approx(-math.exp(0.1) / 2)


def test_without_a_dual_clip_an_overflow_is_one() -> None:
    logp = torch.tensor([[90.0, 0.1]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = ppo_policy_loss(logp, torch.zeros(1, 2), torch.tensor([[-1.0, 1.0]]), mask, clip_range=0.2)
    assert found.loss.item() == math.inf
    assert math.isfinite(found.ratio.item() + found.approx_kl.item())


# ------------------------------------------------------------------------------------ KL in the loss


@pytest.mark.parametrize(("estimator", "values"), [("k2", [0.005, 4.5]), ("k3", [0.004837, 2.049787])])
def test_the_kl_loss_is_the_mean_of_its_estimator_over_the_response(
    estimator: Any, values: list[float]
) -> None:
    reference = torch.tensor([[9.0, -1.0, -4.0], [5.0, 5.0, 5.0]])
    logp = torch.tensor([[-9.0, -0.9, -1.0], [-5.0, -5.0, -5.0]])
    mask = torch.tensor([[False, True, True], [False, False, False]])
    loss = kl_loss(logp, reference, mask, estimator=estimator)
    assert loss.item() == pytest.approx(sum(values) / 2, abs=1e-6)
    assert kl_loss(logp, reference, mask, estimator=estimator, count=8).item() == pytest.approx(
        sum(values) / 8, abs=1e-6
    )


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    """Over all tokens of a small vocabulary, weighted by their probabilities; that of k1 is 0."""
    scores = torch.tensor([0.3, -1.2, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    logp = scores.log_softmax(dim=0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), scores, retain_graph=True)
    found = torch.zeros_like(exact)
    for token in range(4):
        one = logp[token].reshape(1, 1)
        loss = kl_loss(one, reference[token].reshape(1, 1), torch.tensor([[True]]), estimator="k2")
        (gradient,) = torch.autograd.grad(loss, scores, retain_graph=True)
        found += logp[token].exp().detach() * gradient
    torch.testing.assert_close(found, exact)
    assert exact.abs().max() > 0.1


def test_a_token_that_the_policy_has_given_up_does_not_outweigh_all_others() -> None:
    logp = torch.tensor([[-80.0, -1.0]], requires_grad=True)
    loss = kl_loss(logp, torch.tensor([[-1.0, -1.5]]), torch.tensor([[True, True]]), estimator="k3")
    loss.backward()
    assert loss.item() < 2**14
    assert logp.grad is not None
    assert logp.grad.isfinite().all()
