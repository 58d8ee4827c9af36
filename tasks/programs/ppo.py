"""Train a policy with policy gradients against the reward model: PPO, RLOO or GRPO (``ppo.algorithm``).

python -m tasks.programs.ppo DIR

inputs: data, model (the merged SFT model), reward
artifact: adapter/ (the policy), critic/ (a SEQ_CLS adapter; of PPO alone), samples.jsonl, summary.json

A KL penalty holds the policy near the SFT model. Policy, reference, critic and reward model are adapters of
one copy of it. RLOO and GRPO have no critic: an answer is compared with others to the same prompt.

Deviations from Ouyang et al. 2022: LoRA instead of full weights, advantages whitened over the rollout batch
and not per mini-batch, no pretraining mix.
"""

import random
from functools import partial
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
from torch import Tensor

from tasks.config.jobs import PpoJob
from tasks.config.sections.ppo import Ppo
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.ppo_models import TOLERANCE, load_models
from tasks.programs.runtime.program import Run, main
from tasks.programs.runtime.training_samples import TrainingSampler
from tasks.rlhf.algorithms import losses, rewards, sanity_checks, schedules
from tasks.rlhf.algorithms.advantages import explained_variance, gae, group_relative, leave_one_out, whiten
from tasks.rlhf.batches import prompts, sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import loading, lora
from tasks.rlhf.training.finite_checks import check_finite, check_weights
from tasks.rlhf.training.ppo_state import Optimizers, create_optimizers, restore_state, save_state
from tasks.rlhf.training.rollouts import (
    PPO_DIVERGED,
    PpoModels,
    Rollout,
    ScoreRule,
    check_rollout,
    kl_estimates,
    roll_out,
    score_answers,
)
from tasks.system.errors import InputError

ENOUGH_ENDED = 0.5  # share of the sampled answers


def train(job: PpoJob, run: Run) -> None:
    """Optimise the policy against the reward model."""
    settings, machine = job.ppo, run.machine
    device = devices.set_up(machine.device, machine.threads)

    # 1. Prompts; policy = reference = SFT model, critic = reward model; or the checkpoint's.
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer)
    questions = read_prompts(job, run, encoder)
    end_ids = prompts.end_tokens(tokenizer, job.text.template)
    models = load_models(job, run, device)
    frozen = models.frozen
    frozen_before = sanity_checks.digest(frozen)
    optimizers = create_optimizers(models)
    start, kl_coefficient = restore_state(
        run.checkpoints, models, optimizers, kl_coefficient=settings.kl_coefficient
    )
    run.rewind(start)
    tolerance = TOLERANCE[models.model.dtype]
    score_rule = ScoreRule(settings.missing_eos, settings.missing_eos_reward, max_score=settings.max_score)
    sampler = TrainingSampler(
        job,
        run,
        tokenizer,
        policy=partial(lora.active, models.model, "policy"),
        reference=partial(lora.active, models.model, None),
        score=partial(score_answers, models, score_rule),
        total=settings.steps,
    )
    sampler(start)

    for step in range(start, settings.steps):
        # 2. Sample an answer to each prompt of the batch and score it.
        seeds.seed_step(job.seed, step + 1)
        indices = schedules.batch_indices(
            step,
            num_rows=len(questions),
            batch_size=settings.rollouts // settings.group_size,
            seed=job.seed,
        )
        rollout = roll_out(
            models,
            [questions[i] for i in indices for _ in range(settings.group_size)],
            max_tokens=job.text.max_answer_tokens,
            temperature=settings.temperature,
            end_ids=end_ids,
            pad_id=tokenizer.pad_token_id,
            score_rule=score_rule,
            device=device,
        )
        check_rollout(rollout, step + 1)

        # 3. Rewards at every token, advantages, returns.
        mask = rollout.batch.response_mask
        advantages, returns = estimate_advantages(rollout, settings, kl_coefficient=kl_coefficient)
        check_finite({"the advantage": advantages[mask]}, step=step + 1, advice=PPO_DIVERGED)
        kl = kl_estimates(rollout)
        if step == start:
            sanity_checks.check_close(
                "Sampler's and scorer's log-probabilities",
                rollout.sampler_logp[mask],
                rollout.logp[mask],
                tolerance=tolerance,
                cause="the sampler warps its distribution, or left padding shifts positions.",
            )
        if step == start == 0:
            sanity_checks.check_fresh_kl(kl["kl"], kl["kl_k3"], tolerance=tolerance)

        # 4. Several passes over the batch, each in a fresh order.
        rate = schedules.learning_rate(
            step, peak=settings.learning_rate, total=settings.steps, warmup=0, shape="linear"
        )
        optimizers.set_learning_rate(rate)
        updates = update_policy(
            models,
            optimizers,
            rollout,
            advantages,
            returns,
            settings,
            step=step + 1,
            kl_coefficient=kl_coefficient,
            micro_batch=machine.micro_batch,
            tolerance=tolerance if step == start else None,
        )
        check_weights(models.trained, step=step + 1)

        # 5. Now and then a sample; metrics, the controller of the KL penalty, a checkpoint.
        sampler(step + 1)
        metrics = ppo_metrics(
            rollout, returns, updates, kl=kl, kl_coefficient=kl_coefficient, group_size=settings.group_size
        )
        run.log(step + 1, settings.steps, **metrics)
        if settings.kl_target is not None:
            kl_coefficient = rewards.adapt_kl_coefficient(
                kl_coefficient,
                kl["kl"],
                target=settings.kl_target,
                horizon=settings.kl_horizon,
                num_rollouts=settings.rollouts,
            )
        if (step + 1) % max(1, machine.checkpoint_steps // 10) == 0:
            save_state(run.checkpoints, step + 1, models, optimizers, kl_coefficient=kl_coefficient)

    # 6. The artifact; frozen weights must be unchanged.
    if sanity_checks.digest(frozen) != frozen_before:
        raise sanity_checks.StepZeroError(
            "Frozen weights changed during training. "
            "Likely cause: the optimizer was given the base's or the reward model's."
        )
    save_artifact(run, models)
    warn_of_missing_ends(run, max_answer_tokens=job.text.max_answer_tokens)
    run.warnings += encoder.warnings()
    last = run.last()
    shown = {f"ppo.rollout_{name}": last[name] for name in ("reward", "kl", "length", "ended")}
    run.finish(shown | encoder.metrics("ppo"), prompts=len(questions))


def estimate_advantages(
    rollout: Rollout, settings: Ppo, *, kl_coefficient: float
) -> tuple[Tensor, Tensor | None]:
    """Return the advantage of every token, (B, T), and the returns that the critic learns, if there is one.

    With a critic they are whitened over the whole batch. Without one, all tokens of an answer have the
    advantage of its whole reward over those of the other answers to its prompt.
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
    return advantages, returns


class Update(NamedTuple):
    """Losses and statistics of a mini-batch, averaged over its response tokens."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    approx_kl: float
    ratio: float
    skipped: bool = False  # too far from the policy that sampled, so no optimizer step was taken


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
) -> list[Update]:
    """Take one optimizer step per mini-batch and pass over the rollout.

    Return what each mini-batch looked like.

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
            # The KL of a step is checked before the step is taken.
            limit = settings.max_step_kl
            update = update._replace(skipped=limit is not None and not update.approx_kl <= limit)
            updates.append(update)
            if update.skipped:
                continue
            clip_gradients(models, settings.max_grad_norm, step=step)
            optimizers.step(with_policy=step > settings.critic_warmup_steps)
    return updates


def clip_gradients(models: PpoModels, max_grad_norm: float, *, step: int) -> None:
    """Clip the gradient norms of policy and critic separately. Raises InputError if one is not finite."""
    norms: dict[str, float] = {}
    for name, parameters in (("policy", models.policy), ("critic", models.critic)):
        if not parameters:
            continue
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        norms[f"the {name}'s gradient norm"] = norm.item()
    check_finite(norms, step=step, advice=PPO_DIVERGED)


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
    """Add the gradients of one mini-batch, rows ``minibatch``, in parts of ``micro_batch`` rows; the split
    does not change them.
    """
    count = rollout.batch.response_mask[minibatch].sum()
    total = torch.zeros(5, device=count.device)
    for rows in minibatch.split(micro_batch or len(minibatch)):
        batch = rollout.batch.rows(rows)
        width = batch.input_ids.shape[1]
        old_logp, ref_logp, advantage = (
            whole[rows][:, :width] for whole in (rollout.logp, rollout.ref_logp, advantages)
        )
        with lora.active(models.model, "policy") as policy:
            logp = sequences.log_probs(policy, batch, temperature=settings.temperature)
            surrogate = losses.ppo_policy_loss(
                logp,
                old_logp,
                advantage,
                batch.response_mask,
                clip_range=settings.clip_range,
                dual_clip=settings.dual_clip,
                count=count,
            )
            loss = surrogate.loss
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
                    sequences.values(critic, models.value_head, batch),
                    rollout.values[rows][:, :width],
                    returns[rows][:, :width],
                    batch.response_mask,
                    clip_range=settings.value_clip_range,
                    count=count,
                ).loss
                (settings.value_weight * value_loss).backward()
        statistics = (surrogate.clip_fraction, surrogate.approx_kl, surrogate.ratio)
        total += torch.stack([loss.detach(), value_loss.detach(), *statistics])
    return Update(*total.tolist())


def ppo_metrics(
    rollout: Rollout,
    returns: Tensor | None,
    updates: list[Update],
    *,
    kl: dict[str, float],
    kl_coefficient: float,
    group_size: int,
) -> dict[str, float]:
    """Return the metrics of a step: of its rollout, and of its mini-batches on average."""
    mask = rollout.batch.response_mask

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    metrics = {
        "reward": rollout.score.mean().item(),
        **kl,
        "kl_coefficient": kl_coefficient,
        "entropy_estimate": -losses.masked_mean(rollout.logp, mask).item(),
        "length": mask.sum(dim=1).float().mean().item(),
        "ended": rollout.ended.float().mean().item(),
        "policy_loss": mean([update.policy_loss for update in updates]),
        "value_loss": mean([update.value_loss for update in updates]),
        "clip_fraction": mean([update.clip_fraction for update in updates]),
        "approx_kl": mean([update.approx_kl for update in updates]),
        "explained_variance": 0.0,
        "skipped": sum(update.skipped for update in updates),
    }
    if rollout.values is not None and returns is not None:
        metrics["explained_variance"] = explained_variance(rollout.values, returns, mask)
    else:
        del metrics["value_loss"], metrics["explained_variance"]
    if group_size > 1:  # a prompt whose answers have equal scores teaches nothing without a critic
        groups = rollout.score.view(-1, group_size)
        metrics["equal_groups"] = (groups == groups[:, :1]).all(dim=1).float().mean().item()
    return metrics


def save_artifact(run: Run, models: PpoModels) -> None:
    """Write the policy, and the critic if there is one."""
    lora.save(models.model, "policy", run.artifact / "adapter", base=models.base)
    if models.value_head is not None:
        score = models.value_head.weight
        lora.save(models.model, "critic", run.artifact / "critic", base=models.base, score=score)


def warn_of_missing_ends(run: Run, *, max_answer_tokens: int) -> None:
    """Warn if most sampled answers were cut off, so that the reward model never scored them."""
    if (ended := run.mean("ended")) < ENOUGH_ENDED:
        run.warn(
            f"Only {ended:.0%} of the sampled answers ended within text.max_answer_tokens = "
            f"{max_answer_tokens}; every other "
            "one got ppo.missing_eos_reward instead of a score. Raise text.max_answer_tokens or fine-tune "
            "longer."
        )


def read_prompts(job: PpoJob, run: Run, encoder: Encoder) -> list[list[int]]:
    """Return the RL split's prompts as token ids, in an order drawn from the seed.

    Raises InputError if there are none.
    """
    texts = pq.read_table(run.inputs["data"] / "rl.parquet", columns=["prompt"])["prompt"].to_pylist()
    if not texts:
        raise InputError("The rl split has no prompts: raise data.rl_share or give more data.")
    random.Random(job.seed).shuffle(texts)
    return [encoder.encode_prompt(text) for text in texts]


if __name__ == "__main__":
    main(train, PpoJob)
