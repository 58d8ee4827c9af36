"""Estimate the advantages of a rollout's tokens: PPO, RLOO or GRPO."""

import torch
from torch import Tensor

from tasks.config.sections.ppo import Ppo
from tasks.rlhf.algorithms import rewards
from tasks.rlhf.algorithms.advantages import gae, group_relative, leave_one_out, whiten
from tasks.rlhf.algorithms.importance_weights import importance_weights
from tasks.rlhf.training.rollouts import Rollout


def estimate_advantages(
    rollout: Rollout, settings: Ppo, *, kl_coefficient: float
) -> tuple[Tensor, Tensor | None]:
    """Return the advantage of every token, (B, T), and the returns that the critic learns, if there is one.

    With a critic they are whitened over the whole batch. Without one, all tokens of an answer have the
    advantage of its whole reward over those of the other answers to its prompt. Tokens that the sampler chose
    with another probability than the policy's are weighed for it.
    """
    mask = rollout.batch.response_mask
    token_rewards = rewards.token_rewards(
        rollout.score,
        rollout.logp,
        rollout.ref_logp,
        mask,
        kl_coefficient=kl_coefficient if settings.kl_penalty == "reward" else 0.0,
    )
    returns = None
    if rollout.values is not None:
        advantages, returns = gae(
            token_rewards, rollout.values, mask, discount=settings.discount, gae_lambda=settings.gae_lambda
        )
        advantages = whiten(advantages, mask)
    else:
        groups = token_rewards.sum(dim=1).view(-1, settings.group_size)  # (P, K)
        compared = (
            leave_one_out(groups)
            if settings.algorithm == "rloo"
            else group_relative(groups, scale=settings.scale_by_group)
        )
        advantages = torch.where(mask, compared.flatten()[:, None], 0.0)
    if settings.normalise_length:  # the loss is proportional to the advantage, and its mean is over tokens
        lengths = mask.sum(dim=1, keepdim=True)
        advantages = advantages * lengths.float().mean() / lengths
    if settings.importance_cap is not None:  # the loss is proportional to the advantage; 1 if they are equal
        advantages = advantages * importance_weights(
            rollout.logp, rollout.sampler_logp, mask, most=settings.importance_cap
        )
    return advantages, returns
