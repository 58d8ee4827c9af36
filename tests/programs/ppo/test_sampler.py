"""Test PPO whose sampler is not the scorer: an engine, exact resume with it, and importance weights."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.config.sections.ppo import Ppo
from tasks.programs import ppo
from tasks.programs.ppo_stage.estimate_advantages import estimate_advantages
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.training import continuous_batching
from tests.programs.ppo import ppo_jobs
from tests.support import tiny

ENGINE = {"sampler": "continuous_batching", "steps": 3}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_cut_run_with_an_engine_ends_as_an_uninterrupted_one(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"checkpoint_steps": 10}
    job, whole = ppo_jobs.write_run(tmp_path / "whole", inputs, machine=machine, **ENGINE)
    ppo.train(job, whole)
    logged = [json.loads(line) for line in (whole.directory / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["sampler_gap"] for line in logged if "reward" in line]
    assert len(gaps) == 3
    assert all(0 < gap < 1e-4 for gap in gaps)  # nats a token, by rounding in float32
    job, cut = ppo_jobs.write_run(tmp_path / "cut", inputs, machine=machine, **ENGINE)
    ppo_jobs.train_with_a_cut(job, cut, monkeypatch)
    ppo_jobs.assert_same_weights(whole, cut)


def test_an_engine_at_another_temperature_is_named(
    tmp_path: Path, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = continuous_batching.sample

    def warmer(*args: Any, temperature: float, **settings: Any) -> Any:
        return sample(*args, temperature=1.5 * temperature, **settings)

    monkeypatch.setattr(continuous_batching, "sample", warmer)
    with pytest.raises(StepZeroError, match=r"temperature is 1\.50 times"):
        ppo.train(*ppo_jobs.write_run(tmp_path / "run", inputs, **ENGINE))


def test_tokens_are_weighed_by_what_the_sampler_thought_of_them(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    job, run = ppo_jobs.write_run(tmp_path / "run", inputs)
    models = ppo.load_models(job, run, tiny.CPU)
    rollout = ppo_jobs.sample_answers(job, run, models)
    mask = rollout.batch.response_mask
    estimate = partial(estimate_advantages, kl_coefficient=0.05)
    plain, returns = estimate(rollout, Ppo())
    assert returns is not None
    assert torch.equal(plain, estimate(rollout, Ppo(importance_cap=None))[0])
    difference = torch.where(mask, torch.linspace(-1, 1, mask.numel()).view(mask.shape), 0.0)
    moved = rollout._replace(sampler_logp=rollout.logp - difference)
    weighed, same_returns = estimate(moved, Ppo(importance_cap=1.5))
    torch.testing.assert_close(weighed, plain * difference.exp().clamp(max=1.5))
    assert same_returns is not None
    assert torch.equal(same_returns, returns)  # the critic learns what it saw
    assert (difference.exp() > 1.5).any()
    assert torch.equal(estimate(moved, Ppo(importance_cap=None))[0], plain)
