"""Update policy and critic on a rollout: several passes over it in mini-batches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.config.sections.ppo import Ppo
from tasks.programs.ppo_stage.pretraining_mix import TextMix
from tasks.rlhf.algorithms import losses, sanity_checks
from tasks.rlhf.batches import entropy, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import lora
from tasks.rlhf.training.finite_checks import check_finite
from tasks.rlhf.training.ppo_state import Optimizers
from tasks.rlhf.training.rollouts import PPO_DIVERGED, PpoModels, Rollout


class Update(NamedTuple):
    """Losses and statistics of a mini-batch, averaged over its response tokens."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    approx_kl: float
    ratio: float
    skipped: bool = False  # too far from the policy that sampled, so no optimizer step was taken
    text_loss: float = 0.0  # of text whose gradients are in the same step, if any is mixed in
    text_weight: float = 0.0
    gradient_norm: float = 0.0  # of the policy, before clipping


def update_policy(
    models: PpoModels,
    optimizers: Optimizers,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor | None,
    settings: Ppo,
    *,
    step: int,
    kl_coefficient: float,
    micro_batch: int,
    tolerance: float | None,
    text: TextMix | None = None,
) -> list[Update]:
    """Take one optimizer step per mini-batch and pass over the rollout.

    Return what each mini-batch looked like. Each rank computes the gradients of a part of it.

    With ``tolerance`` the first mini-batch must see the policy that sampled. Raises InputError if a loss or
    gradient is not finite.
    """
    updates: list[Update] = []
    device = rollout.score.device
    for _ in range(settings.epochs):
        order = torch.randperm(settings.rollouts, device="cpu").to(device)
        for minibatch in order.split(settings.minibatch):
            optimizers.zero_grad()
            update = accumulate_gradients(
                models,
                rollout,
                advantages,
                returns,
                minibatch,
                settings,
                kl_coefficient=kl_coefficient,
                micro_batch=micro_batch,
            )
            distributed.sum_gradients(models.trained.values())
            check_finite(
                {
                    "the squared log-ratio": update.approx_kl,
                    "the policy loss": update.policy_loss,
                    "the value loss": update.value_loss,
                },
                step=step,
                advice=PPO_DIVERGED,
            )
            if tolerance is not None and not updates:
                sanity_checks.check_ratio(
                    update.ratio, update.clip_fraction, update.approx_kl, tolerance=tolerance
                )
                sanity_checks.check_gradients(models.trained)
                sanity_checks.check_frozen(models.frozen)
            # The KL of a step is checked before the step is taken.
            limit = settings.max_step_kl
            update = update._replace(skipped=limit is not None and not update.approx_kl <= limit)
            updates.append(update)
            if update.skipped:
                continue
            if text is not None and (trained := step - settings.critic_warmup_steps) > 0:
                number = (trained - 1) * settings.updates_per_step + len(updates) - 1
                mixed = text.add_gradients(models, number)
                updates[-1] = update._replace(text_loss=mixed.loss, text_weight=mixed.weight)
            norm = clip_gradients(models, settings.max_grad_norm, step=step)
            updates[-1] = updates[-1]._replace(gradient_norm=norm)
            optimizers.step(with_policy=step > settings.critic_warmup_steps)
    return updates


def clip_gradients(models: PpoModels, max_grad_norm: float, *, step: int) -> float:
    """Clip the gradient norms of policy and critic separately. Return the policy's before.

    Raises InputError if one is not finite.
    """
    norms: dict[str, float] = {}
    for name, parameters in (("policy", models.policy), ("critic", models.critic)):
        if not parameters:
            continue
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        norms[f"the {name}'s gradient norm"] = norm.item()
    check_finite(norms, step=step, advice=PPO_DIVERGED)
    return norms["the policy's gradient norm"]


def accumulate_gradients(
    models: PpoModels,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor | None,
    minibatch: Tensor,
    settings: Ppo,
    *,
    kl_coefficient: float,
    micro_batch: int,
) -> Update:
    """Add the gradients of this rank's part of one mini-batch, rows ``minibatch``.

    They are computed in parts of ``micro_batch`` rows, which does not change them. Return what the whole
    mini-batch looked like.
    """
    num_tokens = rollout.batch.response_mask[minibatch].sum()
    total = torch.zeros(5, device=num_tokens.device)
    own = distributed.rank_slice(minibatch)  # empty if there are more ranks than rows
    parts = [*filter(len, own.split(micro_batch or max(1, len(own))))]
    for rows, counts in distributed.padded_steps(parts, minibatch[:1]):
        batch = rollout.batch.rows(rows)
        width = batch.input_ids.shape[1]
        count = num_tokens if counts else num_tokens * math.inf  # gradients of 0, in step with other ranks
        old_logp, ref_logp, advantage = (
            whole[rows][:, :width] for whole in (rollout.logp, rollout.ref_logp, advantages)
        )
        with lora.active(models.model, "policy") as policy:
            logp, bonus = fsdp.with_full_weights(policy, _log_probs_and_bonus, batch, settings, count)
            surrogate = losses.ppo_policy_loss(
                logp,
                old_logp,
                advantage,
                batch.response_mask,
                clip_range=settings.clip_range,
                dual_clip=settings.dual_clip,
                count=count,
            )
            loss = surrogate.loss - bonus
            if settings.kl_penalty != "reward":
                loss = loss + kl_coefficient * losses.kl_loss(
                    logp, ref_logp, batch.response_mask, estimator=settings.kl_penalty, count=count
                )
            loss.backward()
        value_loss = torch.zeros_like(surrogate.loss)
        if models.value_head is not None:
            assert rollout.values is not None
            assert returns is not None
            with lora.active(models.model, "critic") as critic:
                value_loss = losses.ppo_value_loss(
                    fsdp.with_full_weights(critic, sequences.values, models.value_head, batch),
                    rollout.values[rows][:, :width],
                    returns[rows][:, :width],
                    batch.response_mask,
                    clip_range=settings.value_clip_range,
                    count=count,
                ).loss
                (settings.value_weight * value_loss).backward()
        statistics = (surrogate.clip_fraction, surrogate.approx_kl, surrogate.ratio)
        total += torch.stack([loss.detach(), value_loss.detach(), *statistics])
    policy_loss, of_values, clipped, kl, ratio = distributed.all_reduce(total.tolist())
    return Update(policy_loss, of_values, clipped, kl, ratio)


def _log_probs_and_bonus(
    policy: PreTrainedModel, batch: Sequences, settings: Ppo, count: Tensor
) -> tuple[Tensor, Tensor | float]:
    """Return the policy's log-probabilities (B, T), and what its entropy takes off the loss, a scalar."""
    if not settings.entropy_weight:
        return sequences.log_probs(policy, batch, temperature=settings.temperature), 0.0
    logp, nats = entropy.log_probs_and_entropy(policy, batch, temperature=settings.temperature)
    return logp, settings.entropy_weight * losses.masked_mean(nats, batch.response_mask, count)
