"""Test the entropy bonus: it keeps a policy undecided, and micro-batches do not change it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.programs import ppo
from tasks.programs.ppo_stage import update_policy
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import entropy
from tests.programs.ppo import ppo_jobs
from tests.support import tiny


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("entropy"))


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def test_a_bonus_keeps_the_policy_undecided(inputs: dict[str, Path], tmp_path: Path) -> None:
    last = []
    for weight in (0.0, 1.0):
        settings: dict[str, Any] = {"steps": 6, "rollouts": 16, "learning_rate": 1e-2, "kl_coefficient": 0.0}
        job, run = ppo_jobs.write_run(
            tmp_path / f"{weight}",
            inputs,
            entropy_weight=weight,
            max_step_kl=None,
            on_alarm="warn",
            **settings,
        )
        ppo.train(job, run)
        last.append(lines(run)[-1]["entropy_estimate"])
    assert last[1] > last[0] + 0.3


def gradients(inputs: dict[str, Path], folder: Path, *, micro: int, weight: float) -> torch.Tensor:
    """Return the policy's gradients at advantages of 0: those of the bonus alone."""
    job, run = ppo_jobs.write_run(folder, inputs, entropy_weight=weight, algorithm="rloo")
    models = ppo.load_models(job, run, tiny.CPU)
    torch.manual_seed(11)
    rollout = ppo_jobs.sample_answers(job, run, models)
    for name, parameter in models.policy.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    update_policy.accumulate_gradients(
        models, rollout, torch.zeros_like(rollout.logp), None, torch.arange(8), job.ppo,
        kl_coefficient=0.0, micro_batch=micro,
    )  # fmt: skip
    found = [parameter.grad.flatten() for parameter in models.policy.values() if parameter.grad is not None]
    return torch.cat(found)


def test_micro_batches_do_not_change_it(inputs: dict[str, Path], tmp_path: Path) -> None:
    whole = gradients(inputs, tmp_path / "whole", micro=0, weight=0.5)
    assert whole.abs().max() > 1e-4
    parts = gradients(inputs, tmp_path / "parts", micro=3, weight=0.5)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-3)
    twice = gradients(inputs, tmp_path / "twice", micro=0, weight=1.0)
    torch.testing.assert_close(twice, 2 * whole, atol=1e-5, rtol=1e-3)


def test_without_a_weight_it_is_not_computed(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(entropy, "log_probs_and_entropy", refuse)
    ppo.train(*ppo_jobs.write_run(tmp_path / "run", inputs))
