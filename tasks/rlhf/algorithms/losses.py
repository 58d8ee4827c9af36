"""The losses of alignment, as functions of tensors. Sums are divided by a count that the caller may fix for a whole optimizer step."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Sum of ``values`` where ``mask`` is True, over ``count`` (default: how many those are). A scalar."""
    total = torch.where(mask, values, values.new_zeros(())).sum()
    return total / (mask.sum() if count is None else count)


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_w - r_l - m) of each pair (Ouyang et al. 2022, eq. 1 for K = 2; Touvron et al. 2023, eq. 2). Rewards, margin and loss (B,)."""
    assert chosen.shape == rejected.shape
    assert chosen.dim() == 1
    return -F.logsigmoid(chosen - rejected - margin)


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_w + r_l)^2 of each pair, which holds the rewards' mean at 0 (Eisenstein et al. 2023, section 3). Rewards (B,), penalty (B,)."""
    assert chosen.shape == rejected.shape
    return (chosen + rejected) ** 2


_LARGEST_EXPONENT = 80.0  # e^88.7 is infinite in float32


class PolicyLoss(NamedTuple):
    loss: Tensor  # scalar, differentiable
    clip_fraction: Tensor  # share of response tokens at which the clipped term is the larger
    approx_kl: Tensor  # mean (log rho)^2 / 2: nats a token from the sampling policy
    ratio: Tensor  # mean rho


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float,
    dual_clip: float | None = None,
    count: float | Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), with the dual clip of Ye et al. 2020 for negative advantages.

    All tensors (B, T); ``count`` is the number of response tokens of the whole optimizer step.
    """
    log_ratio = torch.where(response_mask, logp - old_logp, 0.0)
    # Behind its clip the loss does not depend on rho. There rho is held at twice the clip: above e^88 it would be infinite, and the loss's gradient
    # 0 * inf = NaN. Without a dual clip the loss of a negative advantage has no bound, and an overflow is one.
    held = torch.where(advantages < 0, dual_clip or math.inf, 1 + clip_range)
    ratio = torch.minimum(log_ratio, (2 * held).log()).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        rho = log_ratio.clamp(max=_LARGEST_EXPONENT).exp()
        statistics = [
            masked_mean(x, response_mask, count)
            for x in ((clipped > unclipped).float(), log_ratio**2 / 2, rho)
        ]
    return PolicyLoss(masked_mean(loss, response_mask, count), *statistics)


class ValueLoss(NamedTuple):
    loss: Tensor  # scalar, differentiable
    clip_fraction: Tensor


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float,
    count: float | Tensor | None = None,
) -> ValueLoss:
    """Clipped value loss (Huang et al. 2024): half the mean of the larger squared error. All tensors (B, T)."""
    clipped = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain, bounded = (values - returns) ** 2, (clipped - returns) ** 2
    return ValueLoss(
        0.5 * masked_mean(torch.maximum(plain, bounded), response_mask, count),
        masked_mean((bounded > plain).float().detach(), response_mask, count),
    )


class DpoLoss(NamedTuple):
    loss: Tensor  # (B,)
    chosen_reward: Tensor  # (B,) beta * log(pi/ref) of the chosen answer, detached
    rejected_reward: Tensor  # (B,)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    smoothing: float = 0.0,
) -> DpoLoss:
    """Eq. 7 of Rafailov et al. 2023; ``smoothing`` is cDPO's assumed share of flipped labels. Summed log-probabilities (B,)."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    delta = chosen - rejected
    loss = -(1 - smoothing) * F.logsigmoid(delta) - smoothing * F.logsigmoid(-delta)
    return DpoLoss(loss, chosen.detach(), rejected.detach())


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> DpoLoss:
    """(h - 1 / (2 beta))^2, h the log ratio's difference (Azar et al. 2023, eq. 17; tau is beta). Summed log-probabilities (B,)."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    return DpoLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def perplexity(mean_loss: float) -> float:
    """exp of a mean next-token loss in nats; infinite where that overflows."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
