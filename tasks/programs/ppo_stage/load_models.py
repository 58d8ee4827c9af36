"""Load the four models of PPO on one copy of the base, with the checks that need no rollout."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.config.jobs import PpoJob
from tasks.config.sections.ppo import Ppo
from tasks.config.sections.tuning import Lora
from tasks.programs.runtime import training_setup
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms import sanity_checks
from tasks.rlhf.batches import sequences
from tasks.rlhf.compute import fsdp, seeds
from tasks.rlhf.models import fingerprint, loading, lora, reward_model, trainable
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite
from tasks.rlhf.training.rollouts import PpoModels
from tasks.system.errors import InputError

# Sampler and scorer pad differently; in fp32 that moves log-probabilities by about 1e-6.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}


def load_models(job: PpoJob, run: Run, device: torch.device) -> PpoModels:
    """Return policy and critic, ready to train, with reference and reward model.

    Raises InputError if the reward model belongs to another base or is not accepted, StepZeroError if a model
    does not compute what it must.
    """
    is_sharded = training_setup.is_sharded(run, "ppo")
    load = partial(training_setup.load_base, run, "model", job.weights.merged, job.text, device)
    base = training_setup.load_sharded(load, device) if is_sharded else load()
    actual = fingerprint.compute_fingerprint(run.inputs["model"], base)
    if reward_model.is_adapter(run.inputs["reward"]):
        fingerprint.check_fingerprint(run.inputs["reward"] / "adapter", actual, setting="weights.merged")
    record = reward_model.load_record(run.inputs["reward"])
    refuse_exploitable(record, job.ppo, "The reward model")
    ids = torch.arange(1, 17, device=device)[None] % base.config.vocab_size
    bare = _logits(base, ids)
    seeds.seed_step(job.seed, 0)
    model = _attach(base, "policy", job.ppo.lora)
    shared, reward = reward_model.load(run.inputs["reward"], model, device=device)
    assert shared is model
    value_head, critic = None, dict[str, nn.Parameter]()
    if job.ppo.algorithm == "ppo":
        model, value_head = _load_critic(job, run, model, reward)
        value_head.requires_grad_(True)
        head = {f"value_head.{name}": parameter for name, parameter in value_head.named_parameters()}
        critic = lora.parameters(model, "critic") | head
    models = PpoModels(
        model=model,
        base=actual,
        value_head=value_head,
        reward=reward,
        policy=lora.parameters(model, "policy"),
        critic=critic,
    )
    with lora.active(model, None) as reference:
        sanity_checks.check_close(
            "Adapter-off and bare logits",
            _logits(reference, ids),
            bare,
            tolerance=0.0,
            cause="an adapter was merged into the base.",
        )
    tolerance = TOLERANCE[loading.stored_dtype(base)]
    check_probes(models.reward, record["probes"], device, tolerance=tolerance)
    return models


def load_policy(place: Path, models: PpoModels) -> None:
    """Give the policy the weights of an artifact, of an adapter's folder, or of a file.

    Raises InputError if they do not fit, or belong to another base.
    """
    folder = place / "adapter" if (place / "adapter").is_dir() else place
    if (folder / lora.CONFIG).exists():
        given = LoraConfig.from_pretrained(str(folder))
        own = models.model.peft_config["policy"]
        assert isinstance(given, LoraConfig)
        assert isinstance(own, LoraConfig)
        if (given.r, given.lora_alpha) != (own.r, own.lora_alpha):
            raise InputError(
                f"The policy to start from has an adapter of rank {given.r} and alpha {given.lora_alpha:g}: "
                f"set ppo.lora.rank and ppo.lora.alpha to these; they are {own.r} and {own.lora_alpha:g}."
            )
        fingerprint.check_fingerprint(folder, models.base, setting="weights.merged")
    trainable.load_start(models.policy, place)


def refuse_exploitable(record: dict[str, Any], settings: Ppo, name: str) -> None:
    """Refuse a reward model that prefers worthless answers, if the settings ask for that.

    Raises InputError.
    """
    if record["fooled"] and not settings.allow_exploitable:
        raise InputError(
            f"{name} is fooled by answers that are worth nothing ({', '.join(record['fooled'])}): "
            "train it on more pairs, or set ppo.allow_exploitable=true to go on all the same."
        )


def _attach(base: PreTrainedModel | PeftModel, name: str, settings: Lora) -> PeftModel:
    """Return ``base`` with a fresh adapter (torch's global generator)."""
    config = lora.build_config(
        rank=settings.rank, alpha=settings.alpha, dropout=0.0, targets=settings.targets
    )
    return lora.attach(base, name, config)


@torch.no_grad()
def _load_critic(job: PpoJob, run: Run, model: PeftModel, reward: Scorer) -> tuple[PeftModel, nn.Linear]:
    """Return the model with the critic, and the value head.

    The critic starts as the normalised reward (of an ensemble: its first member's), or at 0 if the reward
    model is a model of its own.
    """
    head = nn.Linear(model.config.hidden_size, 1, dtype=torch.float32, device=model.device)
    if not reward_model.is_adapter(run.inputs["reward"]):
        model = _attach(model, "critic", job.ppo.lora)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return model, head
    model, score = lora.load(model, "critic", run.inputs["reward"] / "adapter")
    assert score is not None
    # Members of an ensemble have a mean and a deviation of their own; a single one has 0 and 1 there.
    first = reward.members[0]
    mean, std = (reward.mean, reward.std) if len(reward.members) == 1 else (first.mean, first.std)
    weight = job.ppo.rewards.model_weight
    head.weight.copy_(weight * score / std)
    head.bias.fill_(-weight * mean / std)
    return model, head


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return fsdp.with_full_weights(model, lambda model: model(ids, use_cache=False).logits)


@torch.no_grad()
def check_probes(
    scorer: Scorer,
    probes: list[dict[str, Any]],
    device: torch.device,
    *,
    tolerance: float,
    name: str = "The",
) -> None:
    """Compare the scores of the stored probes with those that a reward model gives here.

    Raises StepZeroError.
    """
    prompts, answers = [probe["prompt"] for probe in probes], [probe["answer"] for probe in probes]
    batch = sequences.join(prompts, answers, pad_id=0, device=device)
    actual = reward_model.rewards(scorer, batch)
    check_finite({"the reward model's score of its probes": actual}, advice=UNSOUND_MODEL)
    sanity_checks.check_close(
        f"{name} reward model's probe scores and those stored with it",
        actual,
        torch.tensor([probe["score"] for probe in probes], device=device),
        tolerance=tolerance,
        cause="another base or precision.",
    )
