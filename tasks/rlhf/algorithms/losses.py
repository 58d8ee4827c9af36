"""Compute the losses of reward modelling, PPO and DPO from tensors.

Programs choose them by settings in tasks/config/sections/: ``pair_loss`` in tasks/programs/dpo.py by
dpo.loss, the reward model's in tasks/programs/reward.py; PPO's are called in tasks/programs/ppo.py.

Sums are divided by ``count``, which the caller sets to the size of a whole optimizer step, so that micro-
batches add up.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tasks.rlhf.algorithms import rewards


def masked_mean(values: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Return the sum of ``values`` where ``mask`` is True, over ``count`` (default: how many those are).

    A scalar.
    """
    total = torch.where(mask, values, values.new_zeros(())).sum()
    return total / (mask.sum() if count is None else count)


def pairwise_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Return -log sigmoid(r_w - r_l - m) of each pair, (B,). Rewards and margin m (B,).

    Ouyang et al. 2022, eq. 1 for K = 2; with the margin Touvron et al. 2023, eq. 2.
    """
    assert chosen.shape == rejected.shape
    assert chosen.dim() == 1
    return -F.logsigmoid(chosen - rejected - margin)


def centring_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return (r_w + r_l)^2 of each pair, (B,): it keeps the mean reward at 0 (Eisenstein et al. 2023, sec.

    3).
    """
    assert chosen.shape == rejected.shape
    return (chosen + rejected) ** 2


_LARGEST_EXPONENT = 80.0  # e^88.7 is infinite in float32


class PolicyLoss(NamedTuple):
    """PPO's policy loss and statistics of the step, scalars; only ``loss`` is differentiable."""

    loss: Tensor
    clip_fraction: Tensor  # share of response tokens at which the clipped term is the larger
    approx_kl: Tensor  # mean (log rho)^2 / 2: nats a token from the sampling policy
    ratio: Tensor  # mean rho


def ppo_policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float,
    dual_clip: float | None = None,
    count: float | Tensor | None = None,
) -> PolicyLoss:
    """Return PPO's clipped surrogate objective, negated (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    rho_t = exp(logp_t - old_logp_t);  L = masked mean of max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), eps =
    clip_range

    ``dual_clip`` c bounds the loss of negative advantages by -A c (Ye et al. 2020, eq. 5). All tensors (B,
    T); ``count`` is the number of response tokens of the whole optimizer step.
    """
    log_ratio = torch.where(response_mask, logp - old_logp, 0.0)
    # Beyond its clip the loss does not depend on rho. There rho is limited to twice the clip: above e^88 it
    # would be infinite, and the gradient 0 * inf = NaN. Without a dual clip the loss of a negative advantage
    # has no bound, so rho has no limit there and may overflow.
    limit = torch.where(advantages < 0, dual_clip or math.inf, 1 + clip_range)
    ratio = torch.minimum(log_ratio, (2 * limit).log()).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    with torch.no_grad():
        rho = log_ratio.clamp(max=_LARGEST_EXPONENT).exp()
        clip_fraction = masked_mean((clipped > unclipped).float(), response_mask, count)
        approx_kl = masked_mean(log_ratio**2 / 2, response_mask, count)
        mean_ratio = masked_mean(rho, response_mask, count)
    return PolicyLoss(masked_mean(loss, response_mask, count), clip_fraction, approx_kl, mean_ratio)


class ValueLoss(NamedTuple):
    """PPO's value loss and a statistic of the step, scalars; only ``loss`` is differentiable."""

    loss: Tensor
    clip_fraction: Tensor  # share of response tokens at which the clipped error is the larger


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    *,
    clip_range: float,
    count: float | Tensor | None = None,
) -> ValueLoss:
    """Return the clipped value loss (Huang et al. 2024, arXiv 2403.17031). All tensors (B, T).

    L = 1/2 mean of max((v - R)^2, (clip(v, V - clip_range, V + clip_range) - R)^2) over the mask
    """
    clipped_values = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    unclipped, clipped = (values - returns) ** 2, (clipped_values - returns) ** 2
    return ValueLoss(
        0.5 * masked_mean(torch.maximum(unclipped, clipped), response_mask, count),
        masked_mean((clipped > unclipped).float().detach(), response_mask, count),
    )


# k3 has exp(-d): a token that the policy makes much less likely than the reference would outweigh all others.
_SMALLEST_LOG_RATIO = -10.0


def kl_loss(
    logp: Tensor,
    ref_logp: Tensor,
    response_mask: Tensor,
    *,
    estimator: Literal["k2", "k3"],
    count: float | Tensor | None = None,
) -> Tensor:
    """Return the mean KL from the reference over the response tokens, in nats a token, as a part of a loss.

    By Schulman's estimator k2, whose gradient is that of KL(pi || ref), or k3 (Shao et al. 2024, eq. 4),
    whose log-ratio is at least -10. All tensors (B, T), ``logp`` of the policy that is trained.
    """
    log_ratio = torch.where(response_mask, logp - ref_logp, 0.0)
    if estimator == "k2":
        return masked_mean(rewards.k2(log_ratio), response_mask, count)
    return masked_mean(rewards.k3(log_ratio.clamp(min=_SMALLEST_LOG_RATIO)), response_mask, count)


class DpoLoss(NamedTuple):
    """Loss of each pair, and the implicit rewards of its answers."""

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
    """Return DPO's loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) of summed log-probabilities (B,).

    L = -log sigmoid(beta [(log pi_w - log ref_w) - (log pi_l - log ref_l)]). ``smoothing`` is the share of
    flipped labels that cDPO assumes (Mitchell 2023): (1 - smoothing) L + smoothing L(swapped).
    """
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    delta = chosen - rejected
    loss = -(1 - smoothing) * F.logsigmoid(delta) - smoothing * F.logsigmoid(-delta)
    return DpoLoss(loss, chosen.detach(), rejected.detach())


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float
) -> DpoLoss:
    """Return IPO's loss of summed log-probabilities (B,) (Azar et al. 2023, eq. 17; tau is beta).

    L = (h - 1 / (2 beta))^2,  h = (log pi_w - log ref_w) - (log pi_l - log ref_l)
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2
    return DpoLoss(loss, beta * chosen.detach(), beta * rejected.detach())


def perplexity(mean_loss: float) -> float:
    """Return exp of a mean next-token loss in nats; infinite if that overflows."""
    return math.exp(mean_loss) if mean_loss < 700 else math.inf
