"""Test PPO that goes on from a policy: it is that policy, and all is still measured from the SFT model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.programs import ppo
from tasks.programs.ppo_stage.guards import Guards
from tasks.programs.ppo_stage.rollout_checks import RolloutChecks
from tasks.programs.runtime.program import Run
from tasks.rlhf.algorithms.sanity_checks import StepZeroError
from tasks.rlhf.models import lora
from tasks.system.errors import InputError
from tests.programs.ppo import ppo_jobs
from tests.programs.ppo.ppo_jobs import LORA
from tests.support import tiny

SCORE = {"by": "held_out", "every": 2, "prompts": 16, "best_of": 4}
FAST: dict[str, Any] = {"learning_rate": 1e-2, "keep": "final", "score": SCORE}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("start"), held_out_member=True)


@pytest.fixture(scope="module")
def first(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run whose policy others go on from."""
    job, run = ppo_jobs.write_run(tmp_path_factory.mktemp("first") / "ppo", inputs, steps=3, **FAST)
    ppo.train(job, run)
    return run


def scores_of(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.artifact / "scores.json").read_text())
    return found


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


def baseline_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which each run's text statistics of the SFT model are added when it ends."""
    found: list[Any] = []
    finish = Guards.finish

    def remember(guards: Guards, step: int) -> None:
        found.append(guards.baseline)
        finish(guards, step)

    monkeypatch.setattr(Guards, "finish", remember)
    return found


def test_it_goes_on_from_the_policy_and_is_measured_from_the_sft_model(
    inputs: dict[str, Path], first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = baseline_of(monkeypatch)
    checked: list[Any] = []
    check = RolloutChecks.check_start
    monkeypatch.setattr(
        RolloutChecks, "check_start", lambda *given: (checked.append(given[1]), check(*given))[1]
    )
    ppo.train(*ppo_jobs.write_run(tmp_path / "new", inputs, steps=1, **FAST))
    job, run = ppo_jobs.write_run(
        tmp_path / "on", inputs | {"start": first.artifact}, steps=1, **FAST | {"learning_rate": 1e-9}
    )
    checked.clear()
    ppo.train(job, run)
    assert len(checked) == 2, "sampler and scorer are compared with the SFT model and with the policy"
    one, other = (load_file(x.artifact / "adapter" / lora.WEIGHTS) for x in (first, run))
    assert one.keys() == other.keys()
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-6
    assert found[0] == found[1], "the guards compare with the SFT model's own answers"
    start, last = scores_of(run)["points"][0], scores_of(first)["points"][-1]
    assert (start["step"], last["step"]) == (0, 3)
    for name in ("independent_score", "score_reward", "score_kl"):
        assert start[name] == pytest.approx(last[name], rel=1e-4, abs=1e-4), "the last policy's own figures"
    assert start["score_kl"] > 0.1
    assert scores_of(run)["best_of_n"] == scores_of(first)["best_of_n"], "best-of-n is the SFT model's"
    assert lines(run)[0]["kl"] > 0.01


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_policy_that_begins_above_the_kl_budget_is_measured_all_the_same(
    inputs: dict[str, Path], first: Run, tmp_path: Path, action: str
) -> None:
    faulty = {"kl_budget": 1e-3, "on_alarm": action}
    job, run = ppo_jobs.write_run(
        tmp_path / "on", inputs | {"start": first.artifact}, steps=3, **FAST | faulty
    )
    ppo.train(job, run)
    found = scores_of(run)
    assert [alarm["action"] for alarm in found["alarms"]][:1] == [action]
    last_step = {"warn": 3, "stop": 0}[action]
    assert (found["points"][-1]["step"], found["kept_step"]) == (last_step, last_step)
    metrics = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    assert metrics["ppo.independent_score.best"]["n"] == 16


def test_a_cut_run_ends_as_an_uninterrupted_one(
    inputs: dict[str, Path], first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, machine = inputs | {"start": first.artifact}, {"checkpoint_steps": 10}
    whole = ppo_jobs.write_run(tmp_path / "whole", given, machine=machine, steps=4, **FAST)
    ppo.train(*whole)
    job, cut = ppo_jobs.write_run(tmp_path / "cut", given, machine=machine, steps=4, **FAST)
    ppo_jobs.train_with_a_cut(job, cut, monkeypatch)
    ppo_jobs.assert_same_weights(whole[1], cut)
    assert scores_of(whole[1]) == scores_of(cut)


def test_the_sft_model_is_checked_before_the_policy_is_loaded(
    inputs: dict[str, Path], first: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh adapter that is no no-op would move the reference of the KL."""
    job, run = ppo_jobs.write_run(tmp_path / "on", inputs | {"start": first.artifact}, steps=1)
    load = ppo.load_models

    def moved(*given: Any) -> Any:
        models = load(*given)
        with torch.no_grad():
            for name, parameter in models.policy.items():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        return models

    monkeypatch.setattr(ppo, "load_models", moved)
    with pytest.raises(StepZeroError, match="An untrained policy is"):
        ppo.train(job, run)


def test_a_policy_of_another_rank_base_or_kind_is_refused(
    inputs: dict[str, Path], first: Run, tmp_path: Path
) -> None:
    given = inputs | {"start": first.artifact}
    job, run = ppo_jobs.write_run(tmp_path / "rank", given, lora=LORA | {"rank": 3})
    with pytest.raises(InputError, match=r"rank 2 and alpha 4: set ppo\.lora\.rank and ppo\.lora\.alpha"):
        ppo.train(job, run)
    other = shutil.copytree(first.artifact, tmp_path / "other")
    record = json.loads((other / "adapter" / "base.json").read_text())
    record["weights"] = "sha256:" + "0" * 64
    (other / "adapter" / "base.json").write_text(json.dumps(record))
    job, run = ppo_jobs.write_run(tmp_path / "base", inputs | {"start": other})
    with pytest.raises(InputError, match="its base's weights were"):
        ppo.train(job, run)
    job, run = ppo_jobs.write_run(tmp_path / "model", inputs | {"start": inputs["model"]})
    with pytest.raises(InputError, match="does not hold the weights to start from"):
        ppo.train(job, run)


def test_a_file_of_weights_is_enough(inputs: dict[str, Path], first: Run, tmp_path: Path) -> None:
    file = first.artifact / "adapter" / lora.WEIGHTS
    job, run = ppo_jobs.write_run(tmp_path / "file", inputs | {"start": file}, steps=1)
    models = ppo.load_models(job, run, tiny.CPU)
    ppo.load_policy(file, models)
    found = lora.state_dict(models.model, "policy")
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file(file).items())
