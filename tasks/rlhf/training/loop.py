"""Train in optimizer steps with held-out evaluations and checkpoints: SFT, reward model and DPO.

A killed program is started again by tasks/execution/run_stage.py; ``fit`` then resumes from its newest
checkpoint (format: checkpoints.py). PPO, whose loop is tasks/programs/ppo.py, resumes by ppo_state.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tasks.rlhf.algorithms import schedules
from tasks.rlhf.algorithms.schedules import Shape
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.compute.seeds import seed_step
from tasks.rlhf.training import checkpoints, sharded_checkpoints
from tasks.rlhf.training.finite_checks import check_finite, check_weights
from tasks.system.errors import InputError
from tasks.system.interruptions import Interruptions


class Schedule(NamedTuple):
    """The number of steps of a training run, its learning rates and its evaluations."""

    total: int  # optimizer steps
    seed: int
    peak: float  # learning rate
    shape: Shape
    warmup_share: float
    evaluations: int  # of the held-out loss, evenly spread
    patience: int | None  # evaluations without improvement after which the run stops
    keep_best: bool  # the result is the weights of the best evaluation, or else the last


class Best(NamedTuple):
    """The evaluation with the smallest held-out loss so far."""

    loss: float = math.inf
    step: int = 0
    waited: int = 0  # evaluations since then

    def updated(self, step: int, loss: float) -> "Best":
        """Return the best evaluation once that of ``step`` is known; of equal ones, the first."""
        return Best(loss, step) if loss < self.loss else self._replace(waited=self.waited + 1)


class Training:
    """AdamW on some parameters by a schedule, resumed from the newest checkpoint in ``folder``."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        folder: Path,
        schedule: Schedule,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        clip_groups: Sequence[Sequence[str]] = (),
    ) -> None:
        """Prepare the optimizer. Each of ``clip_groups`` has its gradient norm clipped separately.

        Raises InputError if the ranks disagree about the number of steps or the checkpoint.
        """
        self.parameters, self.folder, self.schedule = parameters, folder, schedule
        self.max_grad_norm = max_grad_norm
        groups = clip_groups or [list(parameters)]
        self.clipped = [[parameters[name] for name in names] for names in groups]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(parameters, weight_decay), lr=schedule.peak, fused=True
        )
        self.evaluation_steps = schedules.evaluation_steps(schedule.total, schedule.evaluations)
        self.start, self.best = 0, Best()
        self.step = 0  # the current or last step, from 1
        self.initial_metrics: dict[str, Any] = {}  # measured before the first step, as JSON
        if (checkpoint := checkpoints.newest(folder)) is not None:
            self.start = self.step = checkpoint.step
            self.best = Best(**checkpoint.state["best"])
            self.initial_metrics = checkpoint.state["told"]
            sharded_checkpoints.restore_training(parameters, self.optimizer, checkpoint.folder)
        distributed.check_equal((self.start, schedule.total), "steps or checkpoints")

    def steps(self) -> Iterator[int]:
        """Yield the steps still to be taken, from 0, with random numbers seeded, learning rate set and
        gradients cleared.

        Ends early once ``patience`` evaluations in a row have not improved on the best.
        """
        schedule = self.schedule
        for step in range(self.start, schedule.total):
            if self.has_ended(step):
                return
            self.step = step + 1
            seed_step(schedule.seed, step + 1, rank=distributed.rank())
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)
            self.optimizer.zero_grad(set_to_none=True)
            yield step

    def has_ended(self, step: int) -> bool:
        """Return whether no step follows the first ``step`` ones."""
        patience = self.schedule.patience
        return step == self.schedule.total or (patience is not None and self.best.waited >= patience)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of ``step``, from 0."""
        schedule = self.schedule
        return schedules.learning_rate(
            step,
            peak=schedule.peak,
            total=schedule.total,
            warmup=round(schedule.warmup_share * schedule.total),
            shape=schedule.shape,
        )

    def update(self, loss: float) -> float:
        """All-reduce gradients, clip, step.

        Return the norm before clipping (the largest if groups are clipped separately).

        Raises InputError if the step's ``loss`` or a gradient is not finite.
        """
        distributed.sum_gradients(self.parameters.values())
        norms = [fsdp.clip_grad_norm(group, self.max_grad_norm) for group in self.clipped]
        check_finite({"the loss": loss, "the gradient's norm": sum(norms)}, step=self.step)
        self.optimizer.step()
        return max(norms)

    def record_evaluation(self, step: int, loss: float) -> None:
        """Update the best evaluation with the held-out ``loss`` after ``step`` steps.

        Raises InputError if it is not finite.
        """
        if not math.isfinite(loss):
            raise InputError(
                f"The held-out loss is {loss} after {step} steps: training has diverged; lower learning_rate."
            )
        self.best = self.best.updated(step, loss)

    def save(self, step: int, *, every: int, now: bool = False) -> None:
        """Write a checkpoint if ``step`` is a multiple of ``every``, if the weights are the best so far, or
        ``now``.
        """
        improved = self.best.step == step
        if not (improved or now) and step % every:
            return
        tensors = checkpoints.training_tensors(self.parameters, self.optimizer)
        best = {name: tensors[f"parameter.{name}"] for name in self.parameters} if improved else None
        state = {"best": self.best._asdict(), "told": self.initial_metrics}
        if sharded_checkpoints.is_sharded(self.parameters):
            sharded_checkpoints.save(self.folder, step, tensors, state, best=best)
        elif distributed.is_first():
            checkpoints.save(self.folder, step, tensors, state, best=best)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Load the best weights, if these are to be kept. Raises InputError if a weight is not finite."""
        distributed.barrier()  # the first rank may still be writing them
        if self.schedule.keep_best:
            sharded_checkpoints.restore_best(self.parameters, self.folder)
        check_weights(self.parameters, step=self.step)


class Log(Protocol):
    """Writes the metrics of a step, of ``total`` steps."""

    def __call__(self, step: int, total: int, **metrics: float) -> None: ...


class Sample(Protocol):
    """Samples answers after ``step`` steps, if it is time for it or the weights are the last."""

    def __call__(self, step: int, *, is_last: bool = False) -> None: ...


def fit(
    training: Training,
    accumulate_gradients: Callable[[int], dict[str, float]],
    held_out_loss: Callable[[], float],
    *,
    log: Log,
    checkpoint_steps: int,
    interruptions: Interruptions,
    sample: Sample | None = None,
) -> None:
    """Take all steps that are left, then load the weights that are kept.

    ``accumulate_gradients`` computes the loss of a step (from 0) backward and returns metrics, "loss" among
    them, summed over the ranks. ``held_out_loss`` decides which weights are the best. Raises InputError if a
    loss, a gradient or a weight is not finite.
    """
    total = training.schedule.total
    if sample:
        sample(training.start)
    for step in interruptions.during(training.steps(), distributed.all_reduce):
        # 1. Gradients of the step's rows, and one update with them.
        metrics = accumulate_gradients(step)
        metrics["grad_norm"] = training.update(metrics["loss"])
        metrics["learning_rate"] = training.learning_rate(step)

        # 2. At some steps the held-out loss, which decides which weights are kept.
        if step + 1 in training.evaluation_steps:
            metrics["held_out_loss"] = held_out_loss()
            training.record_evaluation(step + 1, metrics["held_out_loss"])

        # 3. At some steps answers to the same questions, for people to read.
        if sample:
            sample(step + 1, is_last=training.has_ended(step + 1))

        # 4. Metrics first: a step that is in a checkpoint is in the log.
        log(step + 1, total, **metrics)
        training.save(step + 1, every=checkpoint_steps, now=interruptions.wants_checkpoint())
    training.restore_best()


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Return AdamW's groups: matrices decay, norms and biases do not.

    Sharded parameters have groups of their own.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in sorted(parameters.values(), key=lambda p: p.dim() < 2):
        kind = (parameter.dim() > 1, isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": group, "weight_decay": weight_decay if is_matrix else 0.0}
        for (is_matrix, _), group in groups.items()
    ]
