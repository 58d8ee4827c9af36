"""Test PPO's guards: planted hacks are caught, named and acted on, and a cut run decides the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tasks.programs import ppo
from tasks.programs.ppo_stage.guards import Guards
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.evaluation.text_statistics import TextStatistics
from tasks.rlhf.models import reward_model
from tests.programs.ppo import ppo_jobs

USUAL = TextStatistics(0.0, 1.0, 0.0, 0.9, 20.0, 1.0)
EVERY_STEP = {"checkpoint_steps": 10}  # PPO saves ten times as often as the other stages
HACK = {"steps": 14, "rollouts": 32, "minibatch": 16, "learning_rate": 3e-2, "kl_coefficient": 0.0}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("guards"))


def guards(inputs: dict[str, Path], folder: Path, **settings: Any) -> Guards:
    job, run = ppo_jobs.write_run(folder, inputs, **settings)
    models = ppo.load_models(job, run, torch.device("cpu"))
    return Guards(job.ppo, models, {}, {name: one.detach().clone() for name, one in models.policy.items()})


def rows(**changed: float) -> list[TextStatistics]:
    """Return a batch of 32 whose lengths vary a little."""
    return [USUAL._replace(length=20.0 + number % 3)._replace(**changed) for number in range(32)]


def test_an_alarm_needs_two_batches_in_a_row_and_says_what_was_seen(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    found = guards(inputs, tmp_path / "run")
    looping = rows(repeated_4grams=0.9, distinct_2=0.2)
    assert found.check(1, rows(), 0.0) is None
    assert found.check(2, looping, 1.0) is None
    assert found.check(3, rows(), 1.0) is None
    assert found.check(4, looping, 1.0) is None
    alarm = found.check(5, looping, 1.0)
    assert alarm is not None
    assert alarm[0] == 5
    assert found.check(6, looping, 1.0) is not None
    (sentence,) = found.warnings()
    assert sentence.startswith("In step 5 the answers have left the SFT model's range: repeated runs of four")
    assert "0.9 against 0" in sentence
    assert sentence.endswith("So it was in 1 more steps.")


def test_a_kl_above_the_budget_is_a_fault(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run", kl_budget=5.0, text_alarm=None, on_alarm="raise_kl")
    assert [found.check(step, rows(length=1.0), kl) for step, kl in ((1, 0.0), (2, 5.0), (3, 5.1))] == [
        None
    ] * 3
    assert found.check(4, rows(), 6.0) == (4, found.alarms[0].reason, "raise_kl")
    assert "6.0 nats an answer, above ppo.kl_budget=5" in found.warnings()[0]
    assert found.kl_factor == 1.5


def test_a_stop_returns_to_the_weights_before_the_first_fault(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    found = guards(inputs, tmp_path / "run", kl_budget=1.0, on_alarm="stop")
    policy = found.models.policy
    for step, kl in ((1, 0.0), (2, 0.9), (3, 2.0), (4, 2.0)):
        with torch.no_grad():
            for parameter in policy.values():
                parameter.fill_(step)
        alarm = found.check(step, rows(), kl)
    assert alarm is not None
    found.restore()
    assert all((one == 2).all() for one in policy.values())


def test_the_state_survives_a_checkpoint(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run")
    looping = rows(repeated_4grams=0.9)
    found.check(1, rows(), 0.0)
    found.check(2, looping, 0.0)
    again = Guards(found.settings, found.models, json.loads(json.dumps(found.state())), found.good)
    assert again.baseline == found.baseline
    assert again.check(3, looping, 0.0) is not None, "the second fault in a row"


def plant(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the reward model pay for something else than its training taught."""

    def paid(scorer: Any, batch: Sequences) -> Tensor:
        counts = batch.response_mask.sum(dim=1).float()
        if name == "length":
            return counts / 10 - 2
        wanted = (batch.input_ids == 30) & batch.response_mask
        return 4 * wanted.sum(dim=1) / counts - 2

    monkeypatch.setattr(reward_model, "normalised_rewards", paid)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("hack", ["length", "one token"])
def test_a_planted_hack_is_stopped(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hack: str
) -> None:
    """The policy learns what is paid for; without the guard it goes on to the end."""
    plant(monkeypatch, hack)
    extra = {"missing_eos": "add", "missing_eos_reward": 0.0}
    free = ppo_jobs.write_run(tmp_path / "free", inputs, **HACK, **extra)
    ppo.train(*free)
    held = ppo_jobs.write_run(tmp_path / "held", inputs, **HACK, **extra, on_alarm="stop")
    ppo.train(*held)
    assert len(lines(free[1])) == 14
    assert 2 <= len(lines(held[1])) < 14
    (sentence,) = held[1].warnings[-1:]
    assert "the answers have left the SFT model's range" in sentence
    assert "Training ended with the weights before" in sentence
    assert "Training went on" in free[1].warnings[-1]


def test_a_cut_run_stops_at_the_same_step_with_the_same_weights(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "one token")
    settings: dict[str, Any] = {"missing_eos": "add", "missing_eos_reward": 0.0, "on_alarm": "stop"}
    whole = ppo_jobs.write_run(tmp_path / "whole", inputs, machine=EVERY_STEP, **HACK, **settings)
    ppo.train(*whole)
    ended = len(lines(whole[1]))
    honest = ppo.estimate_advantages

    class Killed(Exception):
        pass

    for at in {ended - 1, ended}:  # one of them after the first fault
        steps = iter(range(1, 100))

        def dies(*args: Any, at: int = at, steps: Any = steps, **kwargs: Any) -> Any:
            if next(steps) == at:
                raise Killed
            return honest(*args, **kwargs)

        cut = ppo_jobs.write_run(tmp_path / f"cut-{at}", inputs, machine=EVERY_STEP, **HACK, **settings)
        monkeypatch.setattr(ppo, "estimate_advantages", dies)
        with pytest.raises(Killed):
            ppo.train(*cut)
        monkeypatch.setattr(ppo, "estimate_advantages", honest)
        ppo.train(*cut)
        first, second = (
            load_file(run.artifact / "adapter" / "adapter_model.safetensors") for _, run in (whole, cut)
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert len(lines(cut[1])) == ended
        assert cut[1].warnings == whole[1].warnings
