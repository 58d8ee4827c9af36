"""Proximal policy optimisation with a KL penalty; policy, reference, critic and reward model are adapters of one copy of the SFT model.

    python -m tasks.programs.ppo DIR        inputs: data, model, reward
    artifact: adapter/ (the policy), critic/ (a SEQ_CLS adapter), summary.json

Deviations from Ouyang et al. 2022: LoRA instead of full weights, advantages whitened over the rollout batch and not per mini-batch; no
pretraining mix.
"""

import random
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tasks.config.jobs import PpoJob
from tasks.config.stages import Ppo
from tasks.programs.runtime import pair_tables, training_setup
from tasks.programs.runtime.program import Run, main
from tasks.rlhf.algorithms import losses, rewards, sanity_checks, schedules
from tasks.rlhf.algorithms.advantages import gae, whiten
from tasks.rlhf.batches import prompts, sampling, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.batches.truncation import Encoder
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import fingerprint as models_fingerprint
from tasks.rlhf.models import loading, lora, reward_model
from tasks.rlhf.models import lora as models_lora
from tasks.rlhf.models.fingerprint import Fingerprint
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite, check_weights
from tasks.system.errors import InputError

DIVERGED = "training has diverged; lower ppo.learning_rate"
# Sampler and scorer pad differently; in fp32 that moves log-probabilities by about 1e-6.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
ENOUGH_ENDED = 0.5  # share of the sampled answers


class PpoModels(NamedTuple):
    """Four roles on one base."""

    model: PeftModel
    base: Fingerprint
    value_head: nn.Linear
    reward: Scorer
    policy: dict[str, nn.Parameter]  # trainable parameters
    critic: dict[str, nn.Parameter]


class Rollout(NamedTuple):
    """One batch of sampled answers and everything the update needs; all (B, T) but score (B,)."""

    batch: Sequences
    logp: Tensor
    ref_logp: Tensor
    values: Tensor
    score: Tensor  # normalised; a missing end token has its own
    ended: Tensor  # (B,) bool
    sampler_logp: Tensor


def train(job: PpoJob, run: Run) -> None:
    """Optimise the policy against the reward model."""
    settings = job.ppo
    device = devices.set_up(run.machine.device, run.machine.threads)

    # 1. Prompts; policy = reference = SFT model, critic = reward model; or the checkpoint's.
    tokenizer = loading.load_tokenizer(run.inputs["model"])
    encoder = pair_tables.build_encoder(job.text, tokenizer)
    questions = _prompts(job, run, tokenizer, encoder)
    actors = load_actors(job, run, device)
    frozen = [
        *(p for p in actors.model.parameters() if not p.requires_grad),
        *(p for m in actors.reward.members for p in m.head.parameters()),
    ]
    frozen_before = sanity_checks.digest(frozen)
    policy_optimizer = torch.optim.Adam(actors.policy.values(), eps=1e-5, fused=True)
    critic_optimizer = torch.optim.Adam(actors.critic.values(), eps=1e-5, fused=True)
    start, kl_coefficient = 0, settings.kl_coefficient
    if (checkpoint := checkpoints.latest(run.checkpoints)) is not None:
        start, kl_coefficient = checkpoint.step, checkpoint.state["kl_coefficient"]
        checkpoints.restore_training(actors.policy, policy_optimizer, checkpoint.tensors)
        checkpoints.restore_training(actors.critic, critic_optimizer, checkpoint.tensors)
    run.rewind(start)
    tolerance = TOLERANCE[actors.model.dtype]

    for step in range(start, settings.steps):
        # 2. Sample an answer to each prompt of the batch and score it.
        seeds.seed_step(job.seed, step + 1)
        indices = schedules.batch_indices(
            step, num_rows=len(questions), batch_size=settings.rollouts, seed=job.seed
        )
        rollout = roll_out(actors, [questions[i] for i in indices], tokenizer, job, device)
        mask = rollout.batch.response_mask
        check_rollout(rollout, step + 1)

        # 3. Rewards at every token, advantages, returns; whitened over the whole batch.
        token_rewards = rewards.token_rewards(
            rollout.score, rollout.logp, rollout.ref_logp, mask, kl_coefficient=kl_coefficient
        )
        advantages, returns = gae(
            token_rewards, rollout.values, mask, discount=settings.discount, gae_lambda=settings.gae_lambda
        )
        advantages = whiten(advantages, mask)
        check_finite({"the advantage": advantages[mask]}, step=step + 1, advice=DIVERGED)
        k1 = rewards.k1(rollout.logp - rollout.ref_logp).sum(dim=1).mean().item()
        k3 = rewards.k3(rollout.logp - rollout.ref_logp).sum(dim=1).mean().item()
        if step == start:
            sanity_checks.check_same(
                "Sampler's and scorer's log-probabilities", rollout.sampler_logp[mask], rollout.logp[mask], tolerance=tolerance,
                cause="the sampler warps its distribution, or left padding shifts positions.",
            )  # fmt: skip
            if start == 0:
                sanity_checks.check_fresh_kl(k1, k3, tolerance=tolerance)

        # 4. Several passes over the batch in fresh orders; the KL of a step is looked at before the step is taken.
        rate = schedules.learning_rate(
            step, peak=settings.learning_rate, total=settings.steps, warmup=0, shape="linear"
        )
        for group in (*policy_optimizer.param_groups, *critic_optimizer.param_groups):
            group["lr"] = rate
        updates: list[Update] = []
        skipped = 0
        for _ in range(settings.epochs):
            for minibatch in (
                torch.randperm(settings.rollouts, device="cpu").to(device).split(settings.minibatch)
            ):
                policy_optimizer.zero_grad(set_to_none=True)
                critic_optimizer.zero_grad(set_to_none=True)
                update = accumulate(
                    actors,
                    rollout,
                    advantages,
                    returns,
                    minibatch,
                    settings,
                    micro_batch=run.machine.micro_batch,
                )
                check_finite(
                    {"the squared log-ratio": update.approx_kl, "the policy loss": update.policy_loss, "the value loss": update.value_loss},
                    step=step + 1, advice=DIVERGED,
                )  # fmt: skip
                if step == start and not updates:
                    sanity_checks.check_ratio(
                        update.ratio, update.clip_fraction, update.approx_kl, tolerance=tolerance
                    )
                    sanity_checks.check_gradients(actors.policy | actors.critic)
                updates.append(update)
                if settings.max_step_kl is not None and not update.approx_kl <= settings.max_step_kl:
                    skipped += 1
                    continue
                groups = {"policy": actors.policy, "critic": actors.critic}
                norms = {
                    name: torch.nn.utils.clip_grad_norm_(some.values(), settings.max_grad_norm)
                    for name, some in groups.items()
                }
                check_finite(
                    {f"the {name}'s gradient norm": norm.item() for name, norm in norms.items()},
                    step=step + 1,
                    advice=DIVERGED,
                )
                policy_optimizer.step()
                critic_optimizer.step()

        # 5. Controller, metrics, checkpoint.
        check_weights(actors.policy | actors.critic, step=step + 1)
        lengths = mask.sum(dim=1).float()
        run.log(
            step + 1,
            settings.steps,
            reward=rollout.score.mean().item(),
            kl=k1,
            kl_k3=k3,
            kl_coefficient=kl_coefficient,
            entropy_estimate=-losses.masked_mean(rollout.logp, mask).item(),
            length=lengths.mean().item(),
            ended=rollout.ended.float().mean().item(),
            policy_loss=_mean(updates, "policy_loss"),
            value_loss=_mean(updates, "value_loss"),
            clip_fraction=_mean(updates, "clip_fraction"),
            approx_kl=_mean(updates, "approx_kl"),
            explained_variance=explained_variance(rollout.values, returns, mask),
            skipped=skipped,
        )
        if settings.kl_target is not None:
            kl_coefficient = rewards.adapt_kl_coefficient(
                kl_coefficient,
                k1,
                target=settings.kl_target,
                horizon=settings.kl_horizon,
                num_rollouts=settings.rollouts,
            )
        if (step + 1) % max(1, run.machine.checkpoint_steps // 10) == 0:
            state = checkpoints.training_tensors(
                actors.policy, policy_optimizer
            ) | checkpoints.training_tensors(actors.critic, critic_optimizer)
            checkpoints.save(run.checkpoints, step + 1, state, {"kl_coefficient": kl_coefficient})

    # 6. The artifact; what was frozen must not have moved.
    if sanity_checks.digest(frozen) != frozen_before:
        raise sanity_checks.StepZeroError(
            "Frozen weights changed during training. Likely cause: the optimizer was given the base's or the reward model's."
        )
    lora.save(actors.model, "policy", run.artifact / "adapter", base=actors.base)
    lora.save(
        actors.model, "critic", run.artifact / "critic", base=actors.base, score=actors.value_head.weight
    )
    last = run.last()
    if (ended := run.mean("ended")) < ENOUGH_ENDED:
        run.warn(
            f"Only {ended:.0%} of the sampled answers ended within text.max_answer_tokens = {job.text.max_answer_tokens}; every other one got "
            "ppo.missing_eos_reward instead of a score. Raise text.max_answer_tokens or fine-tune longer."
        )
    run.warnings += encoder.warnings()
    shown = {f"ppo.rollout_{name}": last[name] for name in ("reward", "kl", "length", "ended")}
    run.finish(shown | encoder.metrics("ppo"), prompts=len(questions))


def check_rollout(rollout: Rollout, step: int) -> None:
    """Raise InputError if something of a rollout is not finite."""
    mask = rollout.batch.response_mask
    check_finite({"the SFT model's log-probability": rollout.ref_logp[mask]}, step=step, advice=UNSOUND_MODEL)
    check_finite(
        {"the policy's log-probability": rollout.logp[mask], "the critic's value": rollout.values[mask]},
        step=step,
        advice=DIVERGED,
    )
    check_finite(
        {"the reward model's score": rollout.score},
        step=step,
        advice="train the reward model again, or with a lower reward.learning_rate",
    )


class Update(NamedTuple):
    """What one mini-batch's losses looked like, averaged over its response tokens."""

    policy_loss: float
    value_loss: float
    clip_fraction: float
    approx_kl: float
    ratio: float


def accumulate(
    actors: PpoModels,
    rollout: Rollout,
    advantages: Tensor,
    returns: Tensor,
    minibatch: Tensor,
    settings: Ppo,
    *,
    micro_batch: int,
) -> Update:
    """Add the gradients of one mini-batch, rows ``minibatch``, in parts of ``micro_batch`` rows; the split does not change them."""
    count = rollout.batch.response_mask[minibatch].sum()
    total = torch.zeros(len(Update._fields), device=count.device)
    for rows in minibatch.split(micro_batch or len(minibatch)):
        batch = rollout.batch.rows(rows)
        old_logp, old_values, advantage, target = (
            x[rows][:, : batch.input_ids.shape[1]]
            for x in (rollout.logp, rollout.values, advantages, returns)
        )
        with lora.active(actors.model, "policy") as policy:
            logp = sequences.log_probs(policy, batch, temperature=settings.temperature)
            surrogate = losses.policy_loss(
                logp,
                old_logp,
                advantage,
                batch.response_mask,
                clip_range=settings.clip_range,
                dual_clip=settings.dual_clip,
                count=count,
            )
            surrogate.loss.backward()
        with lora.active(actors.model, "critic") as critic:
            values = sequences.values(critic, actors.value_head, batch)
            error = losses.value_loss(
                values,
                old_values,
                target,
                batch.response_mask,
                clip_range=settings.value_clip_range,
                count=count,
            )
            (settings.value_weight * error.loss).backward()
        total += torch.stack(
            [
                surrogate.loss.detach(),
                error.loss.detach(),
                surrogate.clip_fraction,
                surrogate.approx_kl,
                surrogate.ratio,
            ]
        )
    return Update(*total.tolist())


@torch.no_grad()
def roll_out(
    actors: PpoModels,
    questions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    job: PpoJob,
    device: torch.device,
) -> Rollout:
    """Sample answers with the policy; take its and the reference's log-probabilities, the critic's values and the reward model's scores."""
    settings = job.ppo
    ends, pad = prompts.end_tokens(tokenizer, job.text.template), tokenizer.pad_token_id
    with lora.active(actors.model, "policy") as policy:
        samples = sampling.sample(
            policy,
            questions,
            max_tokens=job.text.max_answer_tokens,
            temperature=settings.temperature,
            end_ids=ends,
            pad_id=pad,
        )
        answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
        batch = sequences.join(questions, answers, pad_id=pad, device=device)
        logp = sequences.log_probs(policy, batch, temperature=settings.temperature)
    with lora.active(actors.model, None) as reference:
        ref_logp = sequences.log_probs(reference, batch, temperature=settings.temperature)
    with lora.active(actors.model, "critic") as critic:
        values = sequences.values(critic, actors.value_head, batch)
    score = reward_model.normalised(actors.reward, batch)
    ended = torch.tensor([answer[-1] in ends for answer in answers], device=device)
    score = torch.where(ended | ~score.isfinite(), score, settings.missing_eos_reward)
    return Rollout(
        batch,
        logp,
        ref_logp,
        values,
        score,
        ended,
        sequences.scatter(samples.logp[samples.mask], batch.response_mask),
    )


def load_actors(job: PpoJob, run: Run, device: torch.device) -> PpoModels:
    """The four roles on one copy of the base, with the checks that need no rollout."""
    base = training_setup.load_base(run, "model", job.weights.merged, job.text, device)
    fingerprint = models_fingerprint.fingerprint(run.inputs["model"], base)
    if reward_model.is_adapter(run.inputs["reward"]):
        models_fingerprint.check(run.inputs["reward"] / "adapter", fingerprint, setting="weights.merged")
    record = reward_model.record_of(run.inputs["reward"])
    if record["fooled"] and not job.ppo.accept_fooled:
        raise InputError(
            f"The reward model is fooled by answers that are worth nothing ({', '.join(record['fooled'])}): train it on more pairs, or set "
            "ppo.accept_fooled=true to go on all the same."
        )
    probe = torch.arange(1, 17, device=device)[None] % base.config.vocab_size
    bare = _logits(base, probe)
    seeds.seed_step(job.seed, 0)
    lora = job.ppo.lora
    model = models_lora.attach(
        base,
        "policy",
        models_lora.lora_config(rank=lora.rank, alpha=lora.alpha, dropout=0.0, targets=lora.targets),
    )
    shared, reward = reward_model.load(run.inputs["reward"], model, device=device)
    assert shared is model
    model, value_head = _critic(job, run, model, reward)
    value_head.requires_grad_(True)
    heads = {f"value_head.{name}": p for name, p in value_head.named_parameters()}
    actors = PpoModels(
        model,
        fingerprint,
        value_head,
        reward,
        models_lora.parameters(model, "policy"),
        models_lora.parameters(model, "critic") | heads,
    )
    with models_lora.active(model, None) as reference:
        sanity_checks.check_same(
            "Adapter-off and bare logits",
            _logits(reference, probe),
            bare,
            tolerance=0.0,
            cause="an adapter was merged into the base.",
        )
    _check_reward_model(actors, record["probes"], device, tolerance=TOLERANCE[loading.stored(base)])
    return actors


@torch.no_grad()
def _critic(job: PpoJob, run: Run, model: PeftModel, reward: Scorer) -> tuple[PeftModel, nn.Linear]:
    """The critic starts as the normalised reward (of an ensemble: its first member's); as nothing, where the reward model is a model of its own."""
    head = nn.Linear(model.config.hidden_size, 1, dtype=torch.float32, device=model.device)
    if reward_model.is_adapter(run.inputs["reward"]):
        model, score = models_lora.load(model, "critic", run.inputs["reward"] / "adapter")
        assert score is not None
        first = reward.members[
            0
        ]  # of an ensemble normalised by itself; alone it has mean 0 and deviation 1 here
        mean, std = (reward.mean, reward.std) if len(reward.members) == 1 else (first.mean, first.std)
        head.weight.copy_(score / std)
        head.bias.fill_(-mean / std)
    else:
        lora = job.ppo.lora
        model = models_lora.attach(
            model,
            "critic",
            models_lora.lora_config(rank=lora.rank, alpha=lora.alpha, dropout=0.0, targets=lora.targets),
        )
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    return model, head


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.no_grad()
def _check_reward_model(
    actors: PpoModels, probes: list[dict[str, Any]], device: torch.device, *, tolerance: float
) -> None:
    prompts, answers = [p["prompt"] for p in probes], [p["answer"] for p in probes]
    batch = sequences.join(prompts, answers, pad_id=0, device=device)
    actual = reward_model.rewards(actors.reward, batch)
    check_finite({"the reward model's score of its probes": actual}, advice=UNSOUND_MODEL)
    expected = torch.tensor([p["score"] for p in probes], device=device)
    sanity_checks.check_same(
        "The reward model's probe scores and those stored with it",
        actual,
        expected,
        tolerance=tolerance,
        cause="another base or precision.",
    )


def _prompts(
    job: PpoJob, run: Run, tokenizer: PreTrainedTokenizerBase, encoder: Encoder | None = None
) -> list[list[int]]:
    """Prompts of the RL split in an order drawn from the seed; ``encoder`` counts what is cut."""
    texts = pq.read_table(run.inputs["data"] / "rl.parquet", columns=["prompt"])["prompt"].to_pylist()
    if not texts:
        raise InputError("The rl split has no prompts: raise data.rl_share or give more data.")
    random.Random(job.seed).shuffle(texts)
    encoder = encoder or pair_tables.build_encoder(job.text, tokenizer)
    return [encoder.prompt(text) for text in texts]


def _mean(updates: list[Update], name: str) -> float:
    return sum(getattr(u, name) for u in updates) / len(updates)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - var(returns - values) / var(returns) over response tokens; 0 where the returns do not vary."""
    variance = returns[mask].var()
    return 0.0 if variance == 0 else float(1 - (returns - values)[mask].var() / variance)


if __name__ == "__main__":
    main(train, PpoJob)
