"""Test kill -9 and resume: every trained artifact is byte for byte that of an uninterrupted run.

The killed program is always a real process. SFT is also resumed by one; the others are resumed in this
process, which saves a start of several seconds.
"""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.config.jobs import DpoJob, Job, PpoJob, PretrainJob, ReferenceJob, RewardJob, SftJob
from tasks.programs import dpo, ppo, pretrain, reference, reward, sft
from tasks.programs.runtime.program import Run
from tasks.rlhf.training import checkpoints
from tasks.system.errors import InputError
from tests.support import tiny
from tests.support.fake_programs import wait_until

pytestmark = pytest.mark.slow

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 24}
LORA = {"rank": 2, "alpha": 4}
BASE = {
    "vocabulary": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "context": 64,
    "steps": 60,
    "batch_size": 4,
}
# stage -> its job, its inputs, and the steps between checkpoints; each is long enough to be killed midway
STAGES: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "pretrain": ({"base": BASE}, ("data",), 8),
    "sft": (
        {
            "text": TEXT,
            "sft": {
                "lora": LORA | {"dropout": 0.1},
                "max_steps": 40,
                "epochs": 80,
                "batch_size": 2,
                "block_tokens": 96,
            },
        },
        ("data", "base"),
        4,
    ),
    "reward": (
        {
            "text": TEXT,
            "reward": {"lora": LORA | {"dropout": 0.1}, "max_steps": 40, "epochs": 80, "batch_size": 3},
        },
        ("data", "model"),
        4,
    ),
    "dpo": (
        {
            "text": TEXT,
            "dpo": {"lora": LORA | {"dropout": 0.1}, "max_steps": 40, "epochs": 80, "batch_size": 3},
        },
        ("data", "model", "reference"),
        4,
    ),
    "ppo": (
        {
            "text": TEXT,
            "ppo": {
                "lora": LORA,
                "steps": 8,
                "rollouts": 6,
                "minibatch": 3,
                "epochs": 2,
                "kl_target": 0.2,
                "kl_horizon": 30,
            },
        },
        ("data", "model", "reward"),
        10,  # PPO saves five times as often
    ),
}

SAMPLED = ("sft", "dpo", "ppo")  # these answer questions at every step

PROGRAMS: dict[str, tuple[Callable[[Any, Run], None], type[Job]]] = {
    "pretrain": (pretrain.train, PretrainJob),
    "sft": (sft.train, SftJob),
    "reward": (reward.train, RewardJob),
    "dpo": (dpo.train, DpoJob),
    "ppo": (ppo.train, PpoJob),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("resume")
    found = {"data": tiny.data_folder(root / "data"), "base": tiny.base_folder(root / "base")}
    found["model"] = found["base"]
    job = {"seed": 0, "text": TEXT, "reward": {"lora": LORA, "max_steps": 4}}
    run = Run(
        tiny.write_job(root / "reward", "reward", job, {name: found[name] for name in ("data", "model")})
    )
    reward.train(RewardJob.model_validate(run.record), run)
    other = Run(
        tiny.write_job(
            root / "reference", "reference", {"text": TEXT}, {name: found[name] for name in ("data", "model")}
        )
    )
    reference.compute(ReferenceJob.model_validate(other.record), other)
    return found | {"reward": run.artifact, "reference": other.artifact}


def prepared(folder: Path, stage: str, inputs: dict[str, Path], **machine: Any) -> Path:
    job, names, every = STAGES[stage]
    if stage in SAMPLED:
        job = job | {"samples": {"prompts": 3, "every": 1}}
    machine = {"checkpoint_steps": every} | machine
    return tiny.write_job(folder, stage, {"seed": 5} | job, {name: inputs[name] for name in names}, **machine)


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [line for line in map(json.loads, text.split("\n")[:-1]) if "phase" not in line]


def run_here(stage: str, folder: Path) -> Path:
    """Run the same program in this process; return its artifact."""
    train, job = PROGRAMS[stage]
    run = Run(folder)
    train(job.model_validate(run.record), run)
    return run.artifact


def contents(artifact: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(artifact)): path.read_bytes()
        for path in sorted(artifact.rglob("*"))
        if path.is_file()
    }


def kill_in_mid_run(stage: str, folder: Path) -> int:
    """Start the program, kill it after its second checkpoint; return the last step that it took."""
    process = tiny.start_program(stage, folder)
    try:
        deadline = time.monotonic() + 900
        while True:
            saved = [
                int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")
            ]  # by name: it deletes them as we look
            taken = steps(folder)
            if saved and taken and taken[-1]["step"] > max(saved) > taken[-1]["total"] // 10:
                break
            assert process.poll() is None, (folder / "log.txt").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    last = steps(folder)[-1]
    assert last["step"] < last["total"]
    assert not (folder / "done").exists()
    return int(last["step"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_as_an_uninterrupted_one(
    stage: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    killed = prepared(tmp_path / "killed", stage, inputs)
    last = kill_in_mid_run(stage, killed)
    resumed_from = checkpoints.latest(killed / "checkpoints")
    assert resumed_from is not None
    assert 0 < resumed_from.step <= last
    before = steps(killed)
    shutil.rmtree(killed / "artifact")  # as tasks.execution.run_stage does
    (killed / "artifact").mkdir()
    resumed = contents(tiny.run_program(stage, killed) if stage == "sft" else run_here(stage, killed))
    assert (
        steps(killed)[: resumed_from.step] == before[: resumed_from.step]
    )  # wall-clock times and all: these steps were not taken again

    whole = contents(run_here(stage, prepared(tmp_path / "whole", stage, inputs)))
    assert resumed.keys() == whole.keys()
    assert {name for name in whole if resumed[name] != whole[name]} == set()
    assert any(name.endswith(".safetensors") for name in whole)
    assert whole["metrics.jsonl"].count(b"\n") == steps(killed)[-1]["total"]
    if stage in SAMPLED:  # no sample twice, none missing
        sampled = [json.loads(line)["step"] for line in resumed["samples.jsonl"].splitlines()]
        assert sampled == list(range(steps(killed)[-1]["total"] + 1))


def test_a_run_that_ends_before_its_first_checkpoint_starts_over(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"seed": 5, "text": TEXT, "sft": {"lora": LORA, "max_steps": 4, "epochs": 80, "block_tokens": 96}}
    folders = [
        tiny.write_job(tmp_path / name, "sft", job, {name: inputs[name] for name in ("data", "base")})
        for name in ("cut", "whole")
    ]
    honest = Run.log

    def cut(run: Run, step: int, total: int, **metrics: float) -> None:
        honest(run, step, total, **metrics)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", cut)
    with pytest.raises(KeyboardInterrupt):
        sft.train(SftJob.model_validate(job), Run(folders[0]))
    monkeypatch.setattr(Run, "log", honest)
    for folder in folders:
        sft.train(SftJob.model_validate(job), Run(folder))
    assert [line["step"] for line in steps(folders[0])] == [1, 2, 3, 4]
    assert contents(folders[0] / "artifact") == contents(folders[1] / "artifact")


def test_a_checkpoint_comes_back_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(3, 3) for _ in range(2)]
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in layers]
    layers[0](torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    names = [
        {"deep.weight": layer.weight, "weight": layer.bias} for layer in layers
    ]  # one name ends like the other
    checkpoints.save(
        tmp_path, 3, checkpoints.training_tensors(names[0], optimizers[0]), {"kl_coefficient": 0.1}
    )
    checkpoints.save(
        tmp_path, 4, checkpoints.training_tensors(names[0], optimizers[0]), {"kl_coefficient": 0.3}
    )
    (tmp_path / "new-00000009").mkdir()  # what a killed program was writing
    found = checkpoints.latest(tmp_path)
    assert found is not None
    assert (found.step, found.state) == (4, {"kl_coefficient": 0.3})
    assert len(list(tmp_path.glob("step-*"))) == 1
    checkpoints.restore_training(names[1], optimizers[1], found.tensors)
    for key, parameter in names[1].items():
        assert torch.equal(parameter, names[0][key])
        ours, theirs = optimizers[1].state[parameter], optimizers[0].state[names[0][key]]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path) is None


SELDOM = 10_000  # steps between checkpoints: none in a run


@pytest.mark.parametrize("stage", ["pretrain", "sft", "ppo"])
def test_a_terminated_run_saves_the_step_that_it_takes(
    stage: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    ended = prepared(tmp_path / "ended", stage, inputs, checkpoint_steps=SELDOM)
    process = tiny.start_program(stage, ended)
    wait_until(lambda: len(steps(ended)) > 1 or process.poll() is not None, every=0.002)
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == -signal.SIGTERM  # a crash for the flow, which starts it again
    before, saved = steps(ended), checkpoints.latest(ended / "checkpoints")
    assert saved is not None
    assert saved.step == before[-1]["step"] < before[-1]["total"]
    resumed = contents(run_here(stage, ended))
    assert steps(ended)[: saved.step] == before
    assert resumed == contents(run_here(stage, prepared(tmp_path / "whole", stage, inputs)))


def test_a_signal_asks_for_a_checkpoint_and_the_run_goes_on(inputs: dict[str, Path], tmp_path: Path) -> None:
    asked = prepared(tmp_path / "asked", "ppo", inputs, checkpoint_steps=SELDOM)
    process = tiny.start_program("ppo", asked)
    wait_until(lambda: steps(asked) or process.poll() is not None, every=0.002)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(900) == 0
    saved = checkpoints.latest(asked / "checkpoints")
    assert saved is not None
    assert 0 < saved.step < STAGES["ppo"][0]["ppo"]["steps"]
    whole = contents(run_here("ppo", prepared(tmp_path / "whole", "ppo", inputs)))
    assert contents(asked / "artifact") == whole


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_run_ends_before_its_time_is_up(
    stage: str, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = prepared(tmp_path / "late", stage, inputs)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 61))  # a minute is for what follows a step
    honest = Run.log

    def slow(run: Run, step: int, total: int, **metrics: float) -> None:
        time.sleep(0.3)
        honest(run, step, total, **metrics)

    monkeypatch.setattr(Run, "log", slow)
    with pytest.raises(
        InputError, match=r"^The time of the Slurm job is nearly used up, .* goes on from there"
    ):
        run_here(stage, late)
    monkeypatch.undo()
    before, saved = steps(late), checkpoints.latest(late / "checkpoints")
    assert saved is not None
    assert saved.step == before[-1]["step"] < before[-1]["total"]
    resumed = contents(run_here(stage, late))
    assert resumed == contents(run_here(stage, prepared(tmp_path / "whole", stage, inputs)))
