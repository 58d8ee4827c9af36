"""Compute the rewards that PPO maximises: the score at the last token minus the KL penalty at every token."""

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, response_mask: Tensor, *, kl_coefficient: float
) -> Tensor:
    """Return the reward of every token (Ziegler et al. 2019, eq. 2).

    r_t = -beta (logp_t - ref_logp_t), plus the score at the last response token

    scores (B,); logp, ref_logp, response_mask (B, T); returns (B, T), zero outside the response. beta is
    ``kl_coefficient``. Every row has a response token.
    """
    rewards = torch.where(response_mask, -kl_coefficient * (logp - ref_logp), 0.0)
    rewards[torch.arange(len(scores), device=scores.device), last_position(response_mask)] += scores
    return rewards


def last_position(mask: Tensor) -> Tensor:
    """Return the index of the last True of each row. mask (B, T) -> (B,); every row must have one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def k1(log_ratio: Tensor) -> Tensor:
    """Return Schulman's k1 = d, d = logp - ref_logp of sampled tokens: unbiased for KL(pi || ref)."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Return Schulman's k2 = d^2 / 2: biased, but its gradient, as a loss of samples, is that of the KL."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Return Schulman's k3 = exp(-d) - 1 + d: unbiased and never negative, but huge for very negative d."""
    return torch.exp(-log_ratio) - 1 + log_ratio


def adapt_kl_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: int, num_rollouts: int
) -> float:
    """Return the next KL coefficient: the proportional controller of Ziegler et al. 2019, section 2.2.

    ``kl`` and ``target`` are in nats per response.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_rollouts / horizon)
