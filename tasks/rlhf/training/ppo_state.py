"""Save and restore the training state of PPO: policy, critic, their optimizers and the KL coefficient.

A killed program resumes from it (tasks/programs/ppo.py); tasks/execution/run_stage.py starts it again.
"""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Adam

from tasks.rlhf.compute import distributed
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.rollouts import PpoModels


class Optimizers(NamedTuple):
    """Adam of policy and critic: equal learning rates, separate moments and clipping."""

    policy: Adam
    critic: Adam | None  # None: without a critic

    @property
    def each(self) -> list[Adam]:
        """Return those that there are."""
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of both."""
        for optimizer in self.each:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def zero_grad(self) -> None:
        """Clear the gradients of both."""
        for optimizer in self.each:
            optimizer.zero_grad(set_to_none=True)

    def step(self, *, with_policy: bool = True) -> None:
        """Take a step with both, or with the critic alone."""
        for optimizer in self.each:
            if with_policy or optimizer is not self.policy:
                optimizer.step()


def create_optimizers(models: PpoModels) -> Optimizers:
    """Return fresh optimizers of policy and critic."""
    return Optimizers(
        policy=Adam(models.policy.values(), eps=1e-5, fused=True),
        critic=Adam(models.critic.values(), eps=1e-5, fused=True) if models.critic else None,
    )


def restore_state(
    folder: Path, models: PpoModels, optimizers: Optimizers
) -> tuple[int, dict[str, Any], dict[str, Tensor]]:
    """Load the newest checkpoint in ``folder``.

    Return the steps done, the state that is no tensor, and the weights to return to if training is stopped,
    which are empty if none were saved. Without a checkpoint no step is done and the state is empty.
    """
    checkpoint = checkpoints.latest(folder)
    if checkpoint is None:
        return 0, {}, {}
    checkpoints.restore_training(models.policy, optimizers.policy, checkpoint.tensors)
    if optimizers.critic is not None:
        checkpoints.restore_training(models.critic, optimizers.critic, checkpoint.tensors)
    good = checkpoints.best(folder) if checkpoint.state["has_good"] else {}
    return checkpoint.step, checkpoint.state, good


def save_state(
    folder: Path,
    step: int,
    models: PpoModels,
    optimizers: Optimizers,
    state: dict[str, Any],
    *,
    good: dict[str, Tensor],
) -> None:
    """Write a checkpoint after ``step`` steps, with what else they depend on. The first rank does."""
    if not distributed.is_first():
        return
    tensors = checkpoints.training_tensors(models.policy, optimizers.policy)
    if optimizers.critic is not None:
        tensors |= checkpoints.training_tensors(models.critic, optimizers.critic)
    state = state | {"has_good": bool(good)}
    checkpoints.save(folder, step, tensors, state, best=good or None)
