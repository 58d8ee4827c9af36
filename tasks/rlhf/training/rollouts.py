"""Sample answers with the policy of PPO and score them with its other models."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.rlhf.algorithms import rewards
from tasks.rlhf.batches import sampling, sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import lora, reward_model
from tasks.rlhf.models.fingerprint import Fingerprint
from tasks.rlhf.models.reward_model import Scorer
from tasks.rlhf.training import continuous_batching
from tasks.rlhf.training.finite_checks import UNSOUND_MODEL, check_finite

PPO_DIVERGED = "training has diverged; lower ppo.learning_rate"


class PpoModels(NamedTuple):
    """Policy, reference, critic and reward model as adapters of one base; with no adapter active, the base is
    the reference.
    """

    model: PeftModel
    base: Fingerprint
    value_head: nn.Linear | None  # None: without a critic
    reward: Scorer
    policy: dict[str, nn.Parameter]  # trainable parameters
    critic: dict[str, nn.Parameter]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters of policy and critic."""
        return self.policy | self.critic

    @property
    def frozen(self) -> list[nn.Parameter]:
        """Return the parameters that no optimizer may change: the base's and the reward model's."""
        frozen = [parameter for parameter in self.model.parameters() if not parameter.requires_grad]
        for member in self.reward.members:
            frozen += member.head.parameters()
        return frozen


class Rollout(NamedTuple):
    """A batch of sampled answers and all that the update needs: (B, T), but score and ended are (B,)."""

    batch: Sequences
    logp: Tensor  # of the policy: the sampler's if it is the plain one in float32, else the scorer's
    ref_logp: Tensor
    values: Tensor | None  # of the critic, if there is one
    score: Tensor  # (B,) normalised reward, clipped, with what an answer without an end token gets
    ended: Tensor  # (B,) bool
    sampler_logp: Tensor
    scorer_logp: Tensor | None = None  # None: not computed


class ScoreRule(NamedTuple):
    """How normalised rewards become the scores that are maximised."""

    missing_eos: Literal["replace", "add"]
    missing_eos_reward: float
    max_score: float | None = None

    def __call__(self, score: Tensor, ended: Tensor) -> Tensor:
        """Return the scores, (B,). A reward that is no number stays one."""
        if self.max_score is not None:
            score = score.clamp(-self.max_score, self.max_score)
        missing = score + self.missing_eos_reward
        if self.missing_eos == "replace":
            missing = torch.full_like(score, self.missing_eos_reward)
        return torch.where(ended | ~score.isfinite(), score, missing)


@torch.no_grad()
def roll_out(
    models: PpoModels,
    prompts: list[list[int]],
    *,
    uniform: Tensor,
    max_tokens: int,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    score_rule: ScoreRule,
    device: torch.device,
    is_checked: bool = False,
    engine_seed: int | None = None,
) -> Rollout:
    """Sample an answer to each prompt, by the numbers ``uniform`` (B, max_tokens) from [0, 1), or with
    ``engine_seed`` by an engine with random numbers of its own.

    Return it with log-probabilities of policy and reference, values and scores. In float32 the policy's are
    those of sampling, which differ by rounding from those that the scorer would compute in a second pass; it
    does so only if the sampler ``is_checked``. In half precision, and with an engine, the difference is too
    large for a ratio of 1.
    """

    def log_probs(model: PreTrainedModel, batch: Sequences) -> Tensor:
        return fsdp.with_full_weights(model, sequences.log_probs, batch, temperature=temperature)

    with lora.active(models.model, "policy") as policy:
        limits: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        limits |= {"end_ids": end_ids, "pad_id": pad_id}
        samples = (
            fsdp.with_full_weights(policy, sampling.sample, prompts, uniform=uniform, **limits)
            if engine_seed is None
            else continuous_batching.sample(policy, prompts, seed=engine_seed, **limits)
        )
        answers = [ids[mask].tolist() for ids, mask in zip(samples.ids, samples.mask, strict=True)]
        batch = sequences.join(prompts, answers, pad_id=pad_id, device=device)
        sampler_logp = sequences.scatter(samples.logp[samples.mask], batch.response_mask)
        is_exact = policy.dtype == torch.float32 and engine_seed is None
        scorer_logp = log_probs(policy, batch) if is_checked or not is_exact else None
    with lora.active(models.model, None) as reference:
        ref_logp = log_probs(reference, batch)
    values = None
    if models.value_head is not None:
        with lora.active(models.model, "critic") as critic:
            values = fsdp.with_full_weights(critic, sequences.values, models.value_head, batch)
    ended = torch.tensor([answer[-1] in end_ids for answer in answers], device=device)
    return Rollout(
        batch=batch,
        # The same one whether it is checked or not, so that a resumed run ends with the same weights.
        logp=sampler_logp if is_exact or scorer_logp is None else scorer_logp,
        ref_logp=ref_logp,
        values=values,
        score=score_answers(models, score_rule, batch, ended),
        ended=ended,
        sampler_logp=sampler_logp,
        scorer_logp=scorer_logp,
    )


def gather_rollout(own: Rollout) -> Rollout:
    """Return the rollout of all ranks, of which each has made the rows of `distributed.rank_slice`."""
    if distributed.world() == 1:
        return own
    device = own.score.device
    by_rank = distributed.all_gather([one if one is None else one.cpu() for one in (*own.batch, *own[1:])])
    ids, mask, *others = (_interleave(parts, device) for parts in zip(*by_rank, strict=True))
    assert ids is not None
    assert mask is not None
    return Rollout(Sequences(ids, mask), *others)  # type: ignore[arg-type]  # None where each rank's is


def _interleave(parts: Iterable[Tensor | None], device: torch.device) -> Tensor | None:
    """Return the rows (N,) or (N, T) of which every rank has each ``world``-th; narrow ones get zeros."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    widths = [part.shape[1] for part in known if part.dim() == 2]
    padded = [functional.pad(part, (0, max(widths) - part.shape[1])) if widths else part for part in known]
    whole = torch.empty(sum(map(len, padded)), *padded[0].shape[1:], dtype=padded[0].dtype)
    for rank, part in enumerate(padded):
        whole[rank :: len(padded)] = part
    return whole.to(device)


def score_answers(models: PpoModels, rule: ScoreRule, batch: Sequences, ended: Tensor) -> Tensor:
    """Return the score of each answer (B,), which PPO maximises; ``ended`` (B,): it has an end token."""
    return rule(reward_model.normalised_rewards(models.reward, batch), ended)


def check_rollout(rollout: Rollout, step: int) -> None:
    """Raise InputError if a log-probability, value or score of a rollout is not finite."""
    mask = rollout.batch.response_mask
    check_finite({"the SFT model's log-probability": rollout.ref_logp[mask]}, step=step, advice=UNSOUND_MODEL)
    of_policy = {"the policy's log-probability": rollout.logp[mask]}
    if rollout.values is not None:
        of_policy["the critic's value"] = rollout.values[mask]
    check_finite(of_policy, step=step, advice=PPO_DIVERGED)
    check_finite(
        {"the reward model's score": rollout.score},
        step=step,
        advice="train the reward model again, or with a lower reward.learning_rate",
    )


def kl_estimates(rollout: Rollout) -> dict[str, float]:
    """Return two estimates of the KL from the reference, in nats an answer (k1 and k3 of Schulman 2020)."""
    log_ratio = rollout.logp - rollout.ref_logp  # (B, T), 0 outside the response
    estimates = {"kl": rewards.k1(log_ratio), "kl_k3": rewards.k3(log_ratio)}
    return {name: estimate.sum(dim=1).mean().item() for name, estimate in estimates.items()}
