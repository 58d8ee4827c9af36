"""Test the supervised loops: best weights survive kills, patience, weight decay, clipping of each group."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.rlhf.algorithms.schedules import evaluation_steps
from tasks.rlhf.training import checkpoints
from tasks.rlhf.training.loop import Best, Schedule, Training, fit, parameter_groups
from tasks.system.errors import InputError
from tasks.system.interruptions import Interruptions

SCHEDULE = Schedule(
    total=6, seed=0, peak=0.1, shape="constant", warmup_share=0, evaluations=6, patience=None, keep_best=True
)


def begun(folder: Path, schedule: Schedule = SCHEDULE) -> Training:
    return Training(
        {"w": nn.Parameter(torch.zeros(2, 2)), "b": nn.Parameter(torch.zeros(2))}, folder, schedule
    )


def run(training: Training, losses: list[float], *, every: int = 100) -> None:
    for step in training.steps():
        for parameter in training.parameters.values():
            parameter.grad = torch.full_like(parameter, float(step + 1))
        training.update(1.0)
        training.record_evaluation(step + 1, losses[step])
        training.save(step + 1, every=every)


@pytest.mark.parametrize(
    ("total", "evaluations", "steps"),
    [(10, 2, {5, 10}), (3, 8, {1, 2, 3}), (1, 4, {1}), (7, 1, {7}), (100, 3, {33, 67, 100})],
)
def test_evaluations_are_spread_evenly_and_the_last_is_at_the_end(
    total: int, evaluations: int, steps: set[int]
) -> None:
    assert evaluation_steps(total, evaluations) == steps


def test_the_best_of_many_is_the_first_of_the_lowest() -> None:
    best = Best()
    for step, loss in enumerate([3.0, 2.0, 2.0, 2.5], 1):
        best = best.updated(step, loss)
    assert best == Best(2.0, 2, 2)


@pytest.mark.parametrize("every", [1, 2, 100])
@pytest.mark.parametrize("killed_after", [1, 2, 3, 4, 5])
def test_a_killed_run_keeps_the_best_weights_of_before(tmp_path: Path, every: int, killed_after: int) -> None:
    losses = [0.5, 0.3, 0.4, 0.6, 0.2, 0.3]
    whole = begun(tmp_path / "whole")
    run(whole, losses, every=every)
    whole.restore_best()
    killed = begun(tmp_path / "killed", SCHEDULE)
    killed.evaluation_steps = whole.evaluation_steps
    for step in killed.steps():
        if step == killed_after:
            break
        for parameter in killed.parameters.values():
            parameter.grad = torch.full_like(parameter, float(step + 1))
        killed.update(1.0)
        killed.record_evaluation(step + 1, losses[step])
        killed.save(step + 1, every=every)
    resumed = begun(tmp_path / "killed")
    assert resumed.start <= killed_after
    run(resumed, losses, every=every)
    resumed.restore_best()
    assert resumed.best == whole.best == Best(0.2, 5, 1)
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])
    assert len(list((tmp_path / "killed").glob("step-*"))) == 1


def test_what_is_kept_is_not_the_last_weights(tmp_path: Path) -> None:
    best, last = begun(tmp_path / "best"), begun(tmp_path / "last", SCHEDULE._replace(keep_best=False))
    for training in (best, last):
        run(training, [0.5, 0.3, 0.4, 0.4, 0.4, 0.4])
        training.restore_best()
    assert not torch.equal(best.parameters["w"], last.parameters["w"])
    assert torch.equal(best.parameters["w"], checkpoints.best(tmp_path / "best")["w"])


def test_patience_ends_a_run_and_a_resumed_one_at_once(tmp_path: Path) -> None:
    schedule = SCHEDULE._replace(patience=2)
    training = begun(tmp_path, schedule)
    run(training, [0.5, 0.6, 0.7, 0.1, 0.1, 0.1], every=1)
    assert training.best == Best(0.5, 1, 2)
    assert list(begun(tmp_path, schedule).steps()) == []


def test_fit_takes_the_steps_in_order_and_logs_before_it_saves(tmp_path: Path) -> None:
    """Three steps down a slope; the second evaluation is the best, so its weights are restored."""
    training = begun(tmp_path, SCHEDULE._replace(total=3, evaluations=3))
    events: list[str] = []
    losses = iter([0.5, 0.3, 0.4])
    logged: list[dict[str, float]] = []

    def accumulate_gradients(step: int) -> dict[str, float]:
        events.append(f"gradients {step}")
        assert all(parameter.grad is None for parameter in training.parameters.values())
        for parameter in training.parameters.values():
            parameter.grad = torch.full_like(parameter, 0.1)
        return {"loss": 2.0 + step}

    def held_out_loss() -> float:
        events.append("evaluation")
        return next(losses)

    def log(step: int, total: int, **metrics: float) -> None:
        latest = checkpoints.latest(tmp_path)
        events.append(f"log {step} of {total}, saved {latest.step if latest else None}")
        logged.append(metrics)

    fit(
        training,
        accumulate_gradients,
        held_out_loss,
        log=log,
        checkpoint_steps=100,
        interruptions=Interruptions(),
    )
    assert events == [
        "gradients 0", "evaluation", "log 1 of 3, saved None",
        "gradients 1", "evaluation", "log 2 of 3, saved 1",
        "gradients 2", "evaluation", "log 3 of 3, saved 2",
    ]  # fmt: skip
    assert [list(metrics) for metrics in logged] == [
        ["loss", "grad_norm", "learning_rate", "held_out_loss"]
    ] * 3
    assert [metrics["loss"] for metrics in logged] == [2.0, 3.0, 4.0]
    assert logged[0]["grad_norm"] == pytest.approx(0.1 * math.sqrt(6))
    assert training.best == Best(0.3, 2, 1)
    kept = checkpoints.best(tmp_path)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in training.parameters.items())
    assert training.parameters["w"][0, 0].item() == pytest.approx(-0.2, abs=1e-4)  # Adam steps of 0.1


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, loss: float) -> None:
    with pytest.raises(InputError, match="has diverged"):
        begun(tmp_path).record_evaluation(3, loss)


def test_matrices_decay_and_biases_do_not() -> None:
    w, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = parameter_groups({"w": w, "b": b}, 0.1)
    assert [(group["params"], group["weight_decay"]) for group in groups] == [([w], 0.1), ([b], 0.0)]
    assert len(parameter_groups({"b": b}, 0.1)) == 1


def test_parts_are_clipped_apart(tmp_path: Path) -> None:
    parameters = {"a": nn.Parameter(torch.zeros(1)), "b": nn.Parameter(torch.zeros(1))}
    training = Training(parameters, tmp_path, SCHEDULE, max_grad_norm=1.0, clip_groups=[["a"], ["b"]])
    parameters["a"].grad, parameters["b"].grad = torch.tensor([100.0]), torch.tensor([0.5])
    assert training.update(1.0) == 100.0
    assert (parameters["a"].grad.item(), parameters["b"].grad.item()) == (pytest.approx(1.0), 0.5)


@pytest.mark.parametrize(
    ("loss", "gradient", "sentence"),
    [
        (math.nan, math.nan, "^The loss is nan in step 3: "),
        (math.inf, 1.0, "^The loss is inf in step 3: "),
        (1.0, math.nan, "^The gradient's norm is nan in step 3: "),
        (1.0, -math.inf, "^The gradient's norm is (inf|nan) in step 3: "),
        (1.0, 3e38, "^The gradient's norm is inf in step 3: "),  # finite itself
    ],
)
def test_a_step_that_is_not_finite_is_not_taken(
    tmp_path: Path, loss: float, gradient: float, sentence: str
) -> None:
    training = begun(tmp_path)
    steps = training.steps()
    for _ in range(3):
        next(steps)
    for name, size in (("w", 1.0), ("b", gradient)):
        training.parameters[name].grad = torch.full_like(training.parameters[name], size)
    with pytest.raises(InputError, match=sentence):
        training.update(loss)
    assert training.step == 3
    assert not any(parameter.any() for parameter in training.parameters.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_no_result(tmp_path: Path, value: float) -> None:
    training = begun(tmp_path, SCHEDULE._replace(keep_best=False))
    training.parameters["w"].data[1, 0] = value
    with pytest.raises(InputError, match=rf"^The weight w is {value} \(1 of 4 values\) in step 0"):
        training.restore_best()
