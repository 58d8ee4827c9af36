"""Estimate advantages with a critic (GAE, Schulman et al. 2016, arXiv 1506.02438), or without one.

Without a critic the answers to one prompt are compared with each other (RLOO, GRPO).
"""

import torch
from torch import Tensor


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, *, discount: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (B, T) each, zero outside the response.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1};  R_t = A_t + V_t   (eq. 11,
    12, 16)

    After the last token V and A are 0. All tensors (B, T); the response tokens of a row are consecutive.
    """
    values, rewards = torch.where(response_mask, values, 0.0), torch.where(response_mask, rewards, 0.0)
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    reversed_advantages = []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        advantage = torch.where(response_mask[:, t], delta + discount * gae_lambda * advantage, 0.0)
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Scale values to mean 0 and (unbiased) standard deviation 1 where ``mask`` is True; zero elsewhere.

    (B, T), of the whole rollout batch: over a mini-batch of one answer, a good answer's tokens would average
    to 0.
    """
    selected = values[mask]
    assert selected.numel() > 1, "whitening needs at least two response tokens"
    scaled = (values - selected.mean()) * torch.rsqrt(selected.var(unbiased=True) + 1e-8)
    return torch.where(mask, scaled, 0.0)


def leave_one_out(rewards: Tensor) -> Tensor:
    """Return the reward of each answer minus the mean of those of the other answers to the same prompt.

    RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8). rewards (P, K) of K >= 2 answers to each of P
    prompts -> (P, K). A number that is added to all rewards of a prompt changes nothing.
    """
    count = rewards.shape[1]
    assert count > 1, "a group has two answers or more"
    return (rewards - rewards.mean(dim=1, keepdim=True)) * count / (count - 1)


def group_relative(rewards: Tensor, *, scale: bool) -> Tensor:
    """Return the reward of each answer minus the mean of its prompt's answers, (P, K) -> (P, K), K >= 2.

    GRPO (Shao et al. 2024, arXiv 2402.03300, sec. 4.1.1). ``scale`` divides by the (unbiased) standard
    deviation of the prompt's rewards, as there; without it prompts on which answers differ little do not
    weigh more than others (Dr. GRPO, Liu et al. 2025, arXiv 2503.20783). Equal rewards give 0.
    """
    assert rewards.shape[1] > 1, "a group has two answers or more"
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-6) if scale else centred


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - var(returns - values) / var(returns) where ``mask`` is True, all (B, T).

    It is 0 if the returns do not vary.
    """
    variance = returns[mask].var()
    return 0.0 if variance == 0 else float(1 - (returns - values)[mask].var() / variance)
