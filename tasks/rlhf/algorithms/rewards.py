"""What PPO maximises: the score at the end token minus the KL penalty at every token."""

import torch
from torch import Tensor


def token_rewards(
    scores: Tensor, logp: Tensor, ref_logp: Tensor, response_mask: Tensor, *, kl_coefficient: float
) -> Tensor:
    """r_t = -beta (logp_t - ref_logp_t), plus the score at the last response token (Ziegler et al. 2019, eq. 2).

    scores (B,); logp, ref_logp, response_mask (B, T); returns (B, T), zero outside the response. Every row has a response token.
    """
    rewards = torch.where(response_mask, -kl_coefficient * (logp - ref_logp), 0.0)
    rewards[torch.arange(len(scores), device=scores.device), last_position(response_mask)] += scores
    return rewards


def last_position(mask: Tensor) -> Tensor:
    """Index of the last True of each row. mask (B, T) -> (B,); every row must have one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def k1(log_ratio: Tensor) -> Tensor:
    """Schulman's estimators of KL(pi || ref) from log_ratio = logp - ref_logp of sampled tokens: the plain, unbiased one."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """Half the square: biased, low variance; as a loss it has the gradient of the KL."""
    return log_ratio**2 / 2


def k3(log_ratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased and never negative, but explodes for very negative d."""
    return torch.exp(-log_ratio) - 1 + log_ratio


def adapt_kl_coefficient(
    coefficient: float, kl: float, *, target: float, horizon: int, num_rollouts: int
) -> float:
    """The proportional controller of Ziegler et al. 2019, section 2.2: kl and target in nats a response."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_rollouts / horizon)
