"""Save and restore the training state of PPO: policy, critic, their optimizers and the KL coefficient.

A killed program resumes from it (tasks/programs/ppo.py); tasks/execution/run_stage.py starts it again.
"""

from pathlib import Path
from typing import NamedTuple

from torch.optim import Adam

from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.rollouts import PpoModels


class Optimizers(NamedTuple):
    """Adam of policy and critic: equal learning rates, separate moments and clipping."""

    policy: Adam
    critic: Adam

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of both."""
        for group in (*self.policy.param_groups, *self.critic.param_groups):
            group["lr"] = rate

    def zero_grad(self) -> None:
        """Clear the gradients of both."""
        for optimizer in self:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Take a step with both."""
        for optimizer in self:
            optimizer.step()


def create_optimizers(models: PpoModels) -> Optimizers:
    """Return fresh optimizers of policy and critic."""
    return Optimizers(
        policy=Adam(models.policy.values(), eps=1e-5, fused=True),
        critic=Adam(models.critic.values(), eps=1e-5, fused=True),
    )


def restore_state(
    folder: Path, models: PpoModels, optimizers: Optimizers, *, kl_coefficient: float
) -> tuple[int, float]:
    """Load the newest checkpoint in ``folder``.

    Return the steps done and the KL coefficient: 0 and the one given if there is none.
    """
    checkpoint = checkpoints.latest(folder)
    if checkpoint is None:
        return 0, kl_coefficient
    checkpoints.restore_training(models.policy, optimizers.policy, checkpoint.tensors)
    checkpoints.restore_training(models.critic, optimizers.critic, checkpoint.tensors)
    return checkpoint.step, checkpoint.state["kl_coefficient"]


def save_state(
    folder: Path, step: int, models: PpoModels, optimizers: Optimizers, *, kl_coefficient: float
) -> None:
    """Write a checkpoint after ``step`` steps."""
    policy = checkpoints.training_tensors(models.policy, optimizers.policy)
    critic = checkpoints.training_tensors(models.critic, optimizers.critic)
    checkpoints.save(folder, step, policy | critic, {"kl_coefficient": kl_coefficient})
