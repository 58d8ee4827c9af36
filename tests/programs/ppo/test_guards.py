"""Test PPO's guards: planted hacks are caught, named and acted on, and a cut run decides the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tasks.config.sections.ppo import Ppo
from tasks.programs import ppo
from tasks.programs.ppo_stage.guard_report import describe_alarms
from tasks.programs.ppo_stage.guards import Guards
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.evaluation.text_statistics import FENCE, TextStatistics
from tasks.rlhf.models import reward_model
from tasks.rlhf.training.ppo_state import create_optimizers
from tests.programs.ppo import ppo_jobs
from tests.support import tiny

USUAL = TextStatistics(0.0, 1.0, 0.0, 0.9, 20.0, 1.0)
EVERY_STEP = {"checkpoint_steps": 10}  # PPO saves ten times as often as the other stages
HACK: dict[str, Any] = {
    "steps": 14, "rollouts": 32, "minibatch": 16, "learning_rate": 3e-2, "kl_coefficient": 0.0,
    "kl_budget_per_token": None, "missing_eos": "add", "missing_eos_reward": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ppo_jobs.write_inputs(tmp_path_factory.mktemp("guards"))


def guards(inputs: dict[str, Path], folder: Path, **settings: Any) -> Guards:
    job, run = ppo_jobs.write_run(folder, inputs, **settings)
    models = ppo.load_models(job, run, torch.device("cpu"))
    return Guards(job.ppo, models, {}, {})


def of(kl: float) -> dict[str, float]:
    return {"kl": kl, "reward": kl / 2}


def rows(**changed: float) -> list[TextStatistics]:
    """Return a batch of 32 whose lengths vary a little."""
    return [USUAL._replace(length=20.0 + number % 3)._replace(**changed) for number in range(32)]


def test_an_alarm_needs_two_batches_in_a_row_and_says_what_was_seen(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    found = guards(inputs, tmp_path / "run")
    looping = rows(repeated_4grams=0.9, distinct_2=0.2)
    assert found.check(1, rows(), of(0.0)) is None
    assert found.check(2, looping, of(1.0)) is None
    assert found.check(3, rows(), of(1.0)) is None
    assert found.check(4, looping, of(1.0)) is None
    alarm = found.check(5, looping, of(1.0))
    assert alarm is not None
    assert alarm[0] == 5
    assert found.check(6, looping, of(1.0)) is not None
    (sentence,) = describe_alarms(found)
    assert sentence.startswith("In step 5 the answers have left the SFT model's range: repeated runs of four")
    assert "0.9 against 0" in sentence
    assert sentence.endswith(" The alarm rang 1 more times.")


def test_a_kl_above_the_budget_is_a_fault(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run", kl_budget=5.0, text_alarm=None, on_alarm="raise_kl")
    assert [found.check(step, rows(length=1.0), of(kl)) for step, kl in ((1, 0.0), (2, 5.0), (3, 5.1))] == [
        None
    ] * 3
    assert found.check(4, rows(), of(6.0)) == (4, found.alarms[0].reason, "raise_kl")
    assert "6.0 nats an answer, above the 5 of ppo.kl_budget=5" in describe_alarms(found)[0]
    assert found.raise_weight(1.0) == 1.5


def test_the_usual_budget_grows_with_the_sft_models_answers(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run", text_alarm=None)
    assert found.check(1, rows(length=24.0), of(0.0)) is None
    for step in range(2, 5):
        assert found.check(step, rows(length=100.0), of(5.9)) is None, "of the first batch alone"
    assert found.check(5, rows(length=24.0), of(6.1)) is None
    alarm = found.check(6, rows(length=24.0), of(6.1))
    assert alarm == (6, alarm and alarm.reason, "roll_back")
    assert "6.1 nats an answer, above the 6 of ppo.kl_budget_per_token=0.25" in describe_alarms(found)[0]
    free = guards(inputs, tmp_path / "free", text_alarm=None, kl_budget_per_token=None)
    assert [free.check(step, rows(), of(1e3)) for step in range(1, 4)] == [None] * 3


def test_a_stop_returns_to_the_weights_before_the_first_fault(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    found = guards(inputs, tmp_path / "run", kl_budget=1.0, on_alarm="stop")
    trained = found.models.trained
    for step, kl in ((1, 0.0), (2, 0.9), (3, 2.0), (4, 2.0)):
        with torch.no_grad():
            for parameter in trained.values():
                parameter.fill_(step)
        alarm = found.check(step, rows(), of(kl))
    assert alarm is not None
    optimizers = create_optimizers(found.models)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    found.restore(optimizers)
    assert not any(optimizer.state for optimizer in optimizers.each), "moments are of other weights"
    assert all((one == 2).all() for one in trained.values()), "of policy and critic"
    assert (found.good_step, found.good_figures) == (1, of(0.9))
    assert "the policy is that of step 1." in describe_alarms(found)[0]


def test_a_policy_that_begins_above_the_budget_is_what_a_stop_returns_to(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    found = guards(inputs, tmp_path / "run", kl_budget=1.0, on_alarm="stop")
    trained = found.models.trained
    for step, kl in ((1, 2.0), (2, 3.0)):
        with torch.no_grad():
            for parameter in trained.values():
                parameter.fill_(step)
        alarm = found.check(step, rows(), of(kl))
    assert alarm is not None
    found.restore()
    assert all((one == 1).all() for one in trained.values())
    assert (found.good_step, found.good_figures) == (0, of(2.0))


def test_the_penalty_is_raised_seven_times_at_most(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run", kl_budget=1.0, on_alarm="raise_kl")
    weight = 1.0
    for step in range(1, 13):
        if found.check(step, rows(), of(2.0)):
            weight = found.raise_weight(weight)
    assert len(found.alarms) == 11
    assert weight == pytest.approx(1.5**7)
    assert "in all to 17.1 times what it was" in describe_alarms(found)[0]


def test_answers_to_few_prompts_are_not_compared(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run", algorithm="rloo", rollouts=32, answers_per_prompt=8)
    for step in range(1, 5):
        assert found.check(step, rows(repeated_4grams=float(step > 1)), of(0.0)) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"on_alarm": "stop", "text_alarm": None, "spike_alarm": None, "kl_budget_per_token": None},
            "nothing to act on",
        ),
        ({"on_alarm": "raise_kl", "kl_coefficient": 0}, "set it above 0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Ppo(**settings)


def test_the_state_survives_a_checkpoint(inputs: dict[str, Path], tmp_path: Path) -> None:
    found = guards(inputs, tmp_path / "run")
    looping = rows(repeated_4grams=0.9)
    found.check(1, rows(), of(0.0))
    found.check(2, looping, of(0.0))
    again = Guards(found.settings, found.models, json.loads(json.dumps(found.state())), {})
    assert again.baseline == found.baseline
    assert again.check(3, looping, of(0.0)) is not None, "the second fault in a row"


def plant(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the reward model pay for something else than its training taught."""
    words = tiny.tokenizer()
    wanted = words(" Use")["input_ids"][0]  # the first word of a good answer

    def paid(scorer: Any, batch: Sequences) -> Tensor:
        counts = batch.response_mask.sum(dim=1).float()
        if name == "length":
            return counts / 10 - 2
        if name == "code fences":
            rows = zip(batch.input_ids, batch.response_mask, strict=True)
            texts = [str(words.decode(ids[mask])) for ids, mask in rows]
            return torch.tensor([4.0 * min(1, text.count(FENCE) / 2) - 2 for text in texts])
        return 4 * ((batch.input_ids == wanted) & batch.response_mask).sum(dim=1) / counts - 2

    monkeypatch.setattr(reward_model, "normalised_rewards", paid)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def with_fences(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return inputs with an SFT model that puts every fourth answer into a code fence."""
    root = tmp_path_factory.mktemp("fences")
    shutil.copytree(inputs["data"], root / "data")
    rows = pq.read_table(root / "data" / "finetune.parquet").to_pylist()
    for row in rows[::4]:
        row["answer"] = f"{FENCE} {row['answer'].split('.')[0]} {FENCE}"
    pq.write_table(pa.Table.from_pylist(rows), root / "data" / "finetune.parquet")
    return ppo_jobs.write_inputs(root, data=root / "data")


@pytest.mark.parametrize("hack", ["length", "one token", "code fences"])
def test_a_planted_hack_is_stopped(
    inputs: dict[str, Path],
    with_fences: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hack: str,
) -> None:
    """The policy learns what is paid for; without the guard it goes on to the end."""
    plant(monkeypatch, hack)
    inputs = with_fences if hack == "code fences" else inputs
    free = ppo_jobs.write_run(tmp_path / "free", inputs, **HACK, on_alarm="warn")
    ppo.train(*free)
    held = ppo_jobs.write_run(tmp_path / "held", inputs, **HACK, on_alarm="stop")
    ppo.train(*held)
    assert len(lines(free[1])) == 14
    assert 2 <= len(lines(held[1])) < 14
    rewards = [line["reward"] for line in lines(free[1])]
    rise = (max(rewards) - rewards[0]) / 10
    onset = next(step for step, reward in enumerate(rewards, start=1) if reward - rewards[0] > rise)
    assert onset <= len(lines(held[1])) <= onset + 10
    (sentence,) = held[1].warnings[-1:]
    assert "the answers have left the SFT model's range" in sentence
    assert "Training ended, and the policy is" in sentence
    assert "Training went on" in free[1].warnings[-1]
    finished = json.loads((held[1].artifact / "summary.json").read_text())["metrics"]
    kept = next(line for line in lines(held[1]) if line["kl"] == finished["ppo.rollout_kl"])
    assert kept["step"] < len(lines(held[1])) - 1, "the figures are those of a batch without a fault"
    assert lines(held[1])[-1]["alarm"] == 4, "the decision is logged"
    assert max(held[1].sampled_steps()) == len(lines(held[1])), "the policy that is kept has answered"


def test_a_cut_run_stops_at_the_same_step_with_the_same_weights(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, "one token")
    settings: dict[str, Any] = {"on_alarm": "stop"}
    whole = ppo_jobs.write_run(tmp_path / "whole", inputs, machine=EVERY_STEP, **HACK, **settings)
    ppo.train(*whole)
    ended = len(lines(whole[1]))
    honest = ppo.describe_rollout

    class Killed(Exception):
        pass

    for at in (ended - 1, ended):  # the second one after the checkpoint of the first fault
        steps = iter(range(1, 100))

        def dies(*args: Any, at: int = at, steps: Any = steps, **kwargs: Any) -> Any:
            if next(steps) == at:
                raise Killed
            return honest(*args, **kwargs)

        cut = ppo_jobs.write_run(tmp_path / f"cut-{at}", inputs, machine=EVERY_STEP, **HACK, **settings)
        monkeypatch.setattr(ppo, "describe_rollout", dies)
        with pytest.raises(Killed):
            ppo.train(*cut)
        monkeypatch.setattr(ppo, "describe_rollout", honest)
        ppo.train(*cut)
        ppo_jobs.assert_same_weights(whole[1], cut[1])
        assert len(lines(cut[1])) == ended
        assert cut[1].warnings == whole[1].warnings
