"""What every supervised loop keeps: parameters, their optimizer, the step it has reached, the best weights so far, and all of it in checkpoints."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tasks.rlhf.algorithms.schedules import Shape, evaluation_steps, learning_rate
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.compute.seeds import seed_step
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.finite_checks import check_finite, check_weights
from tasks.system.errors import InputError


class Plan(NamedTuple):
    """The steps of a run and what belongs to each."""

    total: int  # optimizer steps
    seed: int
    peak: float  # learning rate
    shape: Shape
    warmup_share: float
    evaluations: int  # how often the held-out part is looked at
    patience: int | None  # looks without improvement after which the run stops
    keep_best: bool  # which weights are the result: the best look's, or the last


class Best(NamedTuple):
    """The smallest held-out loss so far."""

    loss: float = math.inf
    step: int = 0
    waited: int = 0  # looks since then

    def after(self, step: int, loss: float) -> "Best":
        return Best(loss, step) if loss < self.loss else self._replace(waited=self.waited + 1)


class Training:
    """AdamW on some parameters by a plan; begins where the newest checkpoint in ``folder`` ended."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        folder: Path,
        plan: Plan,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        apart: Sequence[Sequence[str]] = (),
    ) -> None:
        self.parameters, self.folder, self.plan, self.max_grad_norm = parameters, folder, plan, max_grad_norm
        self.clipped = [[parameters[name] for name in names] for names in apart] or [
            list(parameters.values())
        ]
        self.optimizer = torch.optim.AdamW(decayed(parameters, weight_decay), lr=plan.peak, fused=True)
        self.looks = evaluation_steps(plan.total, plan.evaluations)
        self.start, self.best = 0, Best()
        self.step = 0  # the one that is being or was last taken, from 1
        self.told: dict[str, Any] = {}  # what was found before the first step, as JSON
        if (checkpoint := checkpoints.latest(folder)) is not None:
            self.start, self.best, self.told = (
                checkpoint.step,
                Best(**checkpoint.state["best"]),
                checkpoint.state["told"],
            )
            checkpoints.restore_training(parameters, self.optimizer, checkpoint.tensors)
            self.step = self.start
        distributed.check_equal((self.start, plan.total), "steps or checkpoints")

    def steps(self) -> Iterator[int]:
        """The steps still to be taken, each with its own random numbers, its learning rate and no gradients, until patience is at its end."""
        plan = self.plan
        for step in range(self.start, plan.total):
            if plan.patience is not None and self.best.waited >= plan.patience:
                return
            self.step = step + 1
            seed_step(plan.seed, step + 1, rank=distributed.rank())
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.zero_grad(set_to_none=True)
            yield step

    def rate(self, step: int) -> float:
        """The learning rate of step ``step``, from 0."""
        plan = self.plan
        return learning_rate(
            step,
            peak=plan.peak,
            total=plan.total,
            warmup=round(plan.warmup_share * plan.total),
            shape=plan.shape,
        )

    def update(self, loss: float) -> float:
        """Take the step that all ranks' gradients say; gives their norm before it was clipped, the greatest where parts are clipped apart.

        Raises InputError if the step's ``loss`` or a gradient is not finite.
        """
        distributed.sum_gradients(self.parameters.values())
        norms = [fsdp.clip_grad_norm(some, self.max_grad_norm) for some in self.clipped]
        check_finite({"the loss": loss, "the gradient's norm": sum(norms)}, step=self.step)
        self.optimizer.step()
        return max(norms)

    def judged(self, step: int, loss: float) -> None:
        """``loss`` is the held-out one after ``step`` steps. Raises InputError where it is no number."""
        if not math.isfinite(loss):
            raise InputError(
                f"The held-out loss is {loss} after {step} steps: training has diverged; lower learning_rate."
            )
        self.best = self.best.after(step, loss)

    def save(self, step: int, *, every: int) -> None:
        """Write a checkpoint where one is due after ``step`` steps, and at once when these weights are the best so far."""
        improved = self.best.step == step
        if not improved and step % every:
            return
        tensors = fsdp.gather_full(checkpoints.training_tensors(self.parameters, self.optimizer))
        if distributed.is_first():
            best = {name: tensors[f"parameter.{name}"] for name in self.parameters} if improved else None
            checkpoints.save(
                self.folder, step, tensors, {"best": self.best._asdict(), "told": self.told}, best=best
            )

    @torch.no_grad()
    def conclude(self) -> None:
        """Put the best weights back, where they are to be kept. Raises InputError if a weight is not finite."""
        distributed.barrier()  # the first may still be writing them
        if self.plan.keep_best:
            for name, tensor in checkpoints.best(self.folder).items():
                self.parameters[name].copy_(fsdp.shard_like(tensor, self.parameters[name]))
        check_weights(self.parameters, step=self.step)


def decayed(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """AdamW's groups: matrices decay, norms and biases do not; and what is sharded is no part of a group with what is not."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for p in sorted(parameters.values(), key=lambda p: p.dim() < 2):
        groups.setdefault((p.dim() > 1, isinstance(p, DTensor)), []).append(p)
    return [
        {"params": some, "weight_decay": weight_decay if matrix else 0.0}
        for (matrix, _), some in groups.items()
    ]
