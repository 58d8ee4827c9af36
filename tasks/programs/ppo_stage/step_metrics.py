"""Describe a step of PPO in figures."""

import torch
from torch import Tensor

from tasks.programs.ppo_stage.update_policy import Update
from tasks.rlhf.algorithms import losses
from tasks.rlhf.algorithms.advantages import explained_variance
from tasks.rlhf.evaluation.text_statistics import TextStatistics, mean_statistics
from tasks.rlhf.training.rollouts import Rollout

ROLLOUT_FIGURES = ("reward", "kl", "length", "ended")  # of the last batch, in the stage's summary


def rollout_figures(rollout: Rollout, kl: dict[str, float]) -> dict[str, float]:
    """Return what a rollout says about the policy that sampled it."""
    return {
        "reward": rollout.score.mean().item(),
        **kl,
        "length": rollout.batch.response_mask.sum(dim=1).float().mean().item(),
        "ended": rollout.ended.float().mean().item(),
    }


def step_metrics(
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
        **rollout_figures(rollout, kl),
        "kl_coefficient": kl_coefficient,
        "entropy_estimate": -losses.masked_mean(rollout.logp, mask).item(),
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
    if not torch.equal(rollout.logp, rollout.sampler_logp):
        metrics["sampler_gap"] = losses.masked_mean((rollout.logp - rollout.sampler_logp).abs(), mask).item()
    if taken := [update for update in updates if not update.skipped]:
        metrics["gradient_norm"] = mean([update.gradient_norm for update in taken])
    if mixed := [update for update in updates if update.text_weight]:
        metrics["text_loss"] = mean([update.text_loss for update in mixed])
        metrics["text_weight"] = mixed[-1].text_weight
    if group_size > 1:  # a prompt whose answers have equal scores teaches nothing without a critic
        groups = rollout.score.view(-1, group_size)
        metrics["equal_groups"] = (groups == groups[:, :1]).all(dim=1).float().mean().item()
    return metrics


def text_metrics(rows: list[TextStatistics]) -> dict[str, float]:
    """Return the statistics of a batch's text; length and ends are among the other metrics."""
    found = mean_statistics(rows)._asdict()
    return {name: value for name, value in found.items() if name not in ("length", "ended")}
