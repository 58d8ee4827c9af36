"""Test `accelerate launch` with a configuration of the user's: its ranks take the steps of one process."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flows.preflight import check_inputs
from flows.profiles import load, with_absolute_paths
from tasks.config.jobs import SftJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution.launch import run_program
from tasks.rlhf.compute import accelerate_launch, devices
from tasks.system.errors import InputError, StageCrashed, StageFailed
from tests.programs.ranks.test_distributed import (
    COMPARED,
    ONE_AFTER_ANOTHER,
    inputs,
    prepared,
    program_of,
    run_here,
    steps,
    tree,
)
from tests.support import forked

__all__ = ["inputs", "tree"]  # fixtures

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its launcher")
# as `accelerate config` writes it, for a machine with two GPUs
CONFIG: dict[str, Any] = {
    "compute_environment": "LOCAL_MACHINE", "debug": False, "distributed_type": "MULTI_GPU",
    "downcast_bf16": "no", "enable_cpu_affinity": False, "gpu_ids": "all", "machine_rank": 0,
    "main_training_function": "main", "main_process_port": 0, "mixed_precision": "bf16", "num_machines": 1,
    "num_processes": 2, "rdzv_backend": "static", "same_network": True, "tpu_env": [],
    "tpu_use_cluster": False, "tpu_use_sudo": False, "use_cpu": False,
}  # fmt: skip
FSDP = CONFIG | {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_offload_params": False,
        "fsdp_reshard_after_forward": True, "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        "fsdp_cpu_ram_efficient_loading": True, "fsdp_activation_checkpointing": False,
    },
}  # fmt: skip
STAGES = ("sft", "reward", "dpo", "ppo")
# DPO's reference is of the base as it is stored
ADAPTERS: dict[str | None, tuple[str, ...]] = {None: ("sft", "dpo", "reward"), "nf4": ("sft", "reward")}


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return folder / "accelerate.yaml"


def accelerate(folder: Path, config: dict[str, Any], *program: str, options: tuple[str, ...] = ()) -> int:
    """Run a program by `accelerate launch`; return its exit status."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(write_config(folder, config))]
    return forked.start([*launcher, *options, *program], folder / "log.txt").wait()


def check_equal(one: Path, two: Path) -> None:
    """Compare steps and weights of two artifacts, up to rounding."""
    assert steps(one)
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & COMPARED:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5)
    files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert files == [path.relative_to(two) for path in two.rglob("*.safetensors")] != []
    for path in files:
        weights, others = load_file(one / path), load_file(two / path)
        assert weights.keys() == others.keys()
        assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-5


@LINUX
@pytest.mark.slow
def test_two_ranks_of_accelerate_launch_take_the_steps_of_one_process(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    arguments = []
    for stage in STAGES:
        prepared(tmp_path / "two" / stage, stage, inputs)
        arguments.append(f"{program_of(stage)}={tmp_path / 'two' / stage}")
    (tmp_path / "programs.py").write_text(ONE_AFTER_ANOTHER)
    options = ("--mixed_precision", "no")
    status = accelerate(tmp_path, CONFIG, str(tmp_path / "programs.py"), *arguments, options=options)
    assert status == 0, (tmp_path / "log.txt").read_text()[-3000:]
    for stage in STAGES:
        one = run_here(stage, prepared(tmp_path / "one" / stage, stage, inputs))
        check_equal(one, tmp_path / "two" / stage / "artifact")


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "nf4"])
def test_accelerates_fsdp_shards_the_base_of_adapters(
    precision: str | None, inputs: dict[str, Path], tmp_path: Path
) -> None:
    arguments = []
    for stage in ADAPTERS[precision]:
        weights = {"weights": {"base" if stage == "sft" else "merged": precision}}
        for name in ("one", "two"):
            folder = prepared(tmp_path / name / stage, stage, inputs)
            change_job(folder, weights)
        arguments.append(f"{stage}={tmp_path / 'two' / stage}")
    (tmp_path / "programs.py").write_text(COUNT_SHARDS + ONE_AFTER_ANOTHER)
    options = ("--mixed_precision", "no")
    status = accelerate(tmp_path, FSDP, str(tmp_path / "programs.py"), *arguments, options=options)
    assert status == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert (tmp_path / "log.txt").read_text().count("sharded a base") == 2 * len(ADAPTERS[precision])
    for stage in ADAPTERS[precision]:
        check_equal(run_here(stage, tmp_path / "one" / stage), tmp_path / "two" / stage / "artifact")


COUNT_SHARDS = """
from tasks.rlhf.compute import fsdp

honest = fsdp.shard

def counting(model, device):
    honest(model, device)
    print("sharded a base", flush=True)

fsdp.shard = counting
"""


def change_job(folder: Path, changes: dict[str, Any]) -> None:
    record = json.loads((folder / "job.json").read_text())
    record["job"] |= changes
    (folder / "job.json").write_text(json.dumps(record))


@LINUX
@pytest.mark.slow
def test_the_flow_starts_a_stage_by_accelerate_and_leaves_its_precision_out(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    config = write_config(tmp_path, CONFIG)
    folder = prepared(tmp_path / "sft", "sft", inputs)
    machine = Machine.model_validate(
        {"device": "cpu", "threads": 1, "launch": {"sft": {"accelerate_config": str(config)}}}
    )
    usage = run_program("sft", folder, machine)
    assert usage.peak_mb > 300  # of both ranks
    check_equal(run_here("sft", prepared(tmp_path / "one", "sft", inputs)), folder / "artifact")


# -------------------------------------------------------------------------------------- refused


# of a configuration of FSDP that says nothing of these
FULL = {"FSDP_SHARDING_STRATEGY": "FULL_SHARD", "FSDP_RESHARD_AFTER_FORWARD": "true"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            r"mixed_precision=bf16, .* start it with --mixed_precision no",
        ),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend=INDUCTOR"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not used"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not used"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config is not used"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "set fsdp_offload_params to false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set machine.gradient_checkpointing"),
        (
            {"FSDP_SHARDING_STRATEGY": "NO_SHARD"},
            "asked for fsdp_sharding_strategy=NO_SHARD, .* to FULL_SHARD",
        ),
        ({"FSDP_SHARDING_STRATEGY": "2"}, "asked for fsdp_sharding_strategy=2, .* to FULL_SHARD"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "set fsdp_reshard_after_forward to true"),
        ({"FSDP_IGNORED_MODULES": "lm_head"}, "asked for fsdp_ignored_modules=lm_head, .* leave that out"),
        ({"MASTER_ADDR": "127.0.0.1"}, "set distributed_type to MULTI_GPU"),
    ],
)
def test_what_accelerate_is_asked_for_in_vain_is_refused(changed: dict[str, str], message: str) -> None:
    started = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    accelerate_launch.check({})
    accelerate_launch.check(changed if "ACCELERATE_MIXED_PRECISION" not in changed else {})  # by torchrun
    accelerate_launch.check(started)
    accelerate_launch.check(started | {"MASTER_ADDR": "127.0.0.1", "RANK": "0"})
    accelerate_launch.check(started | FULL)
    with pytest.raises(InputError, match=message):
        accelerate_launch.check(started | changed)


def test_a_cpu_that_accelerate_is_asked_for_in_vain_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.set_up("auto", 0).type == "cuda"  # accelerate did not start this process
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(InputError, match=r"use_cpu: true, .* set machine\.device=cpu"):
        devices.set_up("auto", 0)
    assert devices.set_up("cpu", 0).type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    assert devices.set_up("auto", 0).type == "cuda"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.set_up("auto", 0).type == "cpu"


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "--mixed_precision no"), ({"distributed_type": "MULTI_CPU", "mixed_precision": "no"}, "MULTI_GPU")],
)
def test_a_configuration_that_cannot_be_followed_is_refused_by_the_program(
    changes: dict[str, Any], message: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    folder = prepared(tmp_path / "sft", "sft", inputs)
    assert accelerate(tmp_path, CONFIG | changes, "-m", "tasks.programs.sft", str(folder)) != 0
    error = json.loads((folder / "error.json").read_text())
    assert error["input"]
    assert message in error["message"]


def test_a_configuration_that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text("{}")
    machine = Machine.model_validate({"launch": {"sft": {"accelerate_config": str(tmp_path / "no.yaml")}}})
    with pytest.raises(InputError, match=r"no\.yaml is not there; `accelerate config --config_file"):
        run_program("sft", tmp_path, machine)


SET = "machine.launch.reward.accelerate_config"


def test_a_relative_configuration_is_made_absolute(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    config = with_absolute_paths(load("demo", [f"{SET}=accelerate.yaml"]), tmp_path)
    assert config.machine.launch.reward.accelerate_config == str(tmp_path / "accelerate.yaml")
    assert config.machine.launch.sft.accelerate_config == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"accelerate\.yaml is not there; `accelerate config --config_file"),
        ("a: b: c", r"accelerate\.yaml is not valid YAML: line 1, mapping values are not allowed here"),
        ("[1, 2]", r"accelerate\.yaml holds no settings"),
        (b"\xff", r"accelerate\.yaml cannot be read: "),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused_before_anything_runs(
    tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "accelerate.yaml"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=rf"^{re.escape(SET)}: .*{message}"):
        check_inputs(load("demo", [f"{SET}={path}"]))
    check_inputs(load("demo", [f"{SET}={path}", "pools.gpu=gpu"]))  # it is for the worker to find


# ------------------------------------------------------------------------------------------- launch


def launched(tree: Path, tmp_path: Path, config: dict[str, Any], code: str = "") -> tuple[Path, Machine]:
    """Return a folder whose program has this code, and a machine that starts it by accelerate."""
    (tree / "tasks" / "programs" / "sft.py").write_text(code)
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "job.json").write_text("{}")
    path = write_config(tmp_path, config)
    return folder, Machine.model_validate({"launch": {"sft": {"accelerate_config": str(path)}}})


@pytest.mark.parametrize(
    ("config", "share"),
    [
        ({"num_processes": 2}, 6),
        ({"num_processes": 8, "num_machines": 2}, 3),
        ({"num_processes": 64}, 1),
        ({}, 12),  # one process
        ({"num_processes": -1}, 12),  # accelerate refuses it
        ({"num_processes": "many"}, 12),
        ({"num_machines": 0}, 12),
    ],
)
def test_ranks_share_the_cores(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], share: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    commands = tree / "accelerate" / "commands"
    commands.mkdir(parents=True)
    for package in (commands, commands.parent):
        (package / "__init__.py").touch()
    (commands / "launch.py").write_text(
        "import os; open('threads', 'w').write(os.environ['OMP_NUM_THREADS']); open('done', 'w')"
    )
    folder, machine = launched(tree, tmp_path, config)
    run_program("sft", folder, machine)
    assert (folder / "threads").read_text() == str(share)
    run_program("sft", folder, machine.model_copy(update={"threads": 5}))
    assert (folder / "threads").read_text() == "5"


def test_a_configuration_that_accelerate_refuses_is_told_and_is_no_crash(tree: Path, tmp_path: Path) -> None:
    folder, machine = launched(tree, tmp_path, CONFIG | {"no_such_key": 1})
    with pytest.raises(
        StageFailed, match=r"sft failed: ValueError: .*unknown keys \(\['no_such_key'\]\)"
    ) as told:
        run_program("sft", folder, machine)
    assert not isinstance(told.value, StageCrashed)


def test_accelerate_is_named_where_it_is_not_installed(tree: Path, tmp_path: Path) -> None:
    (tree / "accelerate").mkdir()
    (tree / "accelerate" / "__init__.py").touch()  # found first, and has no commands
    folder, machine = launched(tree, tmp_path, CONFIG)
    with pytest.raises(InputError, match="The stage sft needs accelerate, not installed where it runs"):
        run_program("sft", folder, machine)


def test_a_killed_rank_of_accelerate_is_a_crash(tree: Path, tmp_path: Path) -> None:
    code = (
        "import os\nfrom tasks.config.jobs import SftJob\nfrom tasks.programs.runtime.program import main\n"
    )
    code += "main(lambda job, run: os.kill(os.getpid(), 9), SftJob)\n"
    folder, machine = launched(tree, tmp_path, {"distributed_type": "NO", "num_processes": 1}, code)
    job = SftJob.of(Pipeline()).model_dump(mode="json")
    (folder / "job.json").write_text(json.dumps({"stage": "sft", "job": job, "inputs": {}}))
    with pytest.raises(StageCrashed, match="sft failed: killed by SIGKILL"):
        run_program("sft", folder, machine)


# ----------------------------------------------------------------------------------------- settings


def test_processes_are_said_in_one_place() -> None:
    with pytest.raises(ValueError, match="leave processes and nodes at 1"):
        Machine.model_validate({"launch": {"sft": {"accelerate_config": "a.yaml", "processes": 2}}})


def test_bottlenecks_are_not_sharded() -> None:
    sharded = {"launch": {"dpo": {"shard": True}}}
    Pipeline.model_validate({"machine": sharded, "dpo": {"tune": "lora"}})
    with pytest.raises(ValueError, match=r"machine\.launch\.dpo\.shard is for dpo\.tune=full or lora"):
        Pipeline.model_validate({"machine": sharded, "dpo": {"tune": "bottleneck"}})
