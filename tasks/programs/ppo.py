"""Train a policy with proximal policy optimisation (PPO) against the reward model.

python -m tasks.programs.ppo DIR

inputs: data, model (the merged SFT model), reward
artifact: adapter/ (the policy), critic/ (a SEQ_CLS adapter), samples.jsonl, summary.json

A KL penalty holds the policy near the SFT model. Policy, reference, critic and reward model are adapters of
one copy of it.

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
from tasks.config.stages import Ppo
from tasks.programs.runtime import pair_tables
from tasks.programs.runtime.ppo_models import TOLERANCE, load_models
from tasks.programs.runtime.program import Run, main
from tasks.programs.runtime.training_samples import TrainingSampler
from tasks.rlhf.algorithms import losses, rewards, sanity_checks, schedules
from tasks.rlhf.algorithms.advantages import explained_variance, gae, whiten
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
    sampler = TrainingSampler(
        job,
        run,
        tokenizer,
        policy=partial(lora.active, models.model, "policy"),
        reference=partial(lora.active, models.model, None),
        score=partial(score_answers, models, missing_eos_reward=settings.missing_eos_reward),
        total=settings.steps,
    )
    sampler(start)

    for step in range(start, settings.steps):
        # 2. Sample an answer to each prompt of the batch and score it.
        seeds.seed_step(job.seed, step + 1)
        indices = schedules.batch_indices(
            step, num_rows=len(questions), batch_size=settings.rollouts, seed=job.seed
        )
        rollout = roll_out(
            models,
            [questions[i] for i in indices],
            max_tokens=job.text.max_answer_tokens,
            temperature=settings.temperature,
            end_ids=end_ids,
            pad_id=tokenizer.pad_token_id,
            missing_eos_reward=settings.missing_eos_reward,
            device=device,
        )
        check_rollout(rollout, step + 1)

        # 3. Rewards at every token, advantages, returns; whitened over the whole batch.
        mask = rollout.batch.response_mask
        token_rewards = rewards.token_rewards(
            rollout.score, rollout.logp, rollout.ref_logp, mask, kl_coefficient=kl_coefficient
        )
        advantages, returns = gae(
            token_rewards, rollout.values, mask, discount=settings.discount, gae_lambda=settings.gae_lambda
        )
        advantages = whiten(advantages, mask)
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
            micro_batch=machine.micro_batch,
            tolerance=tolerance if step == start else None,
        )
        check_weights(models.trained, step=step + 1)

        # 5. Now and then a sample; metrics, the controller of the KL penalty, a checkpoint.
        sampler(step + 1)
        metrics = ppo_metrics(rollout, returns, updates, kl=kl, kl_coefficient=kl_coefficient)
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
    returns: Tensor,
    settings: Ppo,
    *,
    step: int,
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
                models, rollout, advantages, returns, minibatch, settings, micro_batch=micro_batch
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
            optimizers.step()
    return updates


def clip_gradients(models: PpoModels, max_grad_norm: float, *, step: int) -> None:
    """Clip the gradient norms of policy and critic separately. Raises InputError if one is not finite."""
    norms: dict[str, float] = {}
    for name, parameters in (("policy", models.policy), ("critic", models.critic)):
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm)
        norms[f"the {name}'s gradient norm"] = norm.item()
    check_finite(norms, step=step, advice=PPO_DIVERGED)


def accumulate_gradients(
    models: PpoModels,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    minibatch: Tensor,
    settings: Ppo,
    *,
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
        old = (rollout.logp, rollout.values, advantages, returns)
        old_logp, old_values, advantage, target = (x[rows][:, :width] for x in old)
        with lora.active(models.model, "policy") as policy:
            surrogate = losses.ppo_policy_loss(
                sequences.log_probs(policy, batch, temperature=settings.temperature),
                old_logp,
                advantage,
                batch.response_mask,
                clip_range=settings.clip_range,
                dual_clip=settings.dual_clip,
                count=count,
            )
            surrogate.loss.backward()
        with lora.active(models.model, "critic") as critic:
            error = losses.ppo_value_loss(
                sequences.values(critic, models.value_head, batch),
                old_values,
                target,
                batch.response_mask,
                clip_range=settings.value_clip_range,
                count=count,
            )
            (settings.value_weight * error.loss).backward()
        statistics = (surrogate.clip_fraction, surrogate.approx_kl, surrogate.ratio)
        total += torch.stack([surrogate.loss.detach(), error.loss.detach(), *statistics])
    return Update(*total.tolist())


def ppo_metrics(
    rollout: Rollout, returns: Tensor, updates: list[Update], *, kl: dict[str, float], kl_coefficient: float
) -> dict[str, float]:
    """Return the metrics of a step: of its rollout, and of its mini-batches on average."""
    mask = rollout.batch.response_mask

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {
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
        "explained_variance": explained_variance(rollout.values, returns, mask),
        "skipped": sum(update.skipped for update in updates),
    }


def save_artifact(run: Run, models: PpoModels) -> None:
    """Write policy and critic."""
    lora.save(models.model, "policy", run.artifact / "adapter", base=models.base)
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
