"""Test a program as a child process: how it ends, its log lines, its death."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from tasks.config.jobs import SftJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import launch, program_environment, program_forks
from tasks.execution.launch import run_program
from tasks.execution.metrics_tail import MetricsTail
from tasks.system.errors import InputError, StageFailed
from tests.support import fake_programs
from tests.support.fake_programs import is_alive, wait_until


@pytest.fixture(params=["forked", "spawned"])
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create a tree of fake programs, forked by the fork server or, as with a GPU, each in a new
    interpreter.
    """
    if request.param == "forked" and sys.platform != "linux":
        pytest.skip("the fork server is for Linux")
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(
        program_environment, "GPU_DEVICES", () if request.param == "forked" else (os.devnull,)
    )
    yield made
    program_forks.stop()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    job = {"stage": "sft", "job": SftJob.of(Pipeline()).model_dump(mode="json"), "inputs": {}, "machine": {}}
    (made / "job.json").write_text(json.dumps(job))
    return made


def test_a_program_that_ends_well_hands_on_its_lines_and_its_memory(tree: Path, directory: Path) -> None:
    lines: list[dict] = []
    usage = run_program("sft", directory, Machine(), on_step=lines.append)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["loss"] == 1.0
    assert 5 < usage.peak_mb < 200
    assert 0 < usage.seconds < 30
    assert "hello from sft" in (directory / "log.txt").read_text()


def test_bad_input_is_told_in_the_programs_own_words(tree: Path, directory: Path) -> None:
    fake_programs.misbehave(tree, "sft", "input")
    with pytest.raises(InputError, match=r"^These posts hold no question with two answers\.$"):
        run_program("sft", directory, Machine())


def test_a_full_disk_is_the_users_to_mend(tree: Path, directory: Path) -> None:
    fake_programs.misbehave(tree, "sft", "enospc")
    with pytest.raises(InputError, match="is full: free some space"):
        run_program("sft", directory, Machine())


def test_a_full_disk_is_told_even_when_the_program_could_not_write_it_down(
    tree: Path, directory: Path
) -> None:
    program = 'import sys\nprint("The disk under /x is full.", file=sys.stderr)\nsys.exit(2)\n'
    (tree / "tasks" / "programs" / "sft.py").write_text(program)
    with pytest.raises(InputError, match=r"^The disk under /x is full\.$"):
        run_program("sft", directory, Machine())


def test_a_failure_names_stage_cause_and_log(tree: Path, directory: Path) -> None:
    fake_programs.misbehave(tree, "sft", "fail")
    with pytest.raises(
        StageFailed, match=f"^The stage sft failed: CUDA went away. Its log: {directory / 'log.txt'}$"
    ):
        run_program("sft", directory, Machine())
    assert "RuntimeError: CUDA went away" in (directory / "log.txt").read_text()


def test_a_library_that_a_worker_lacks_is_named(tree: Path, directory: Path) -> None:
    (tree / "tasks" / "programs" / "sft.py").write_text("import no_such_torch.nn\n")
    with pytest.raises(
        InputError,
        match=(
            r"The stage sft needs no_such_torch, not installed where it runs: pip install "
            r"'alignflow\[train\]' there"
        ),
    ):
        run_program("sft", directory, Machine())


@pytest.mark.parametrize(
    ("program", "cause"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("raise SystemExit(3)", "exit status 3"),
        ("print('not done')", "exit status 0 but not marked done"),
    ],
)
def test_any_other_end_is_a_failure(tree: Path, directory: Path, program: str, cause: str) -> None:
    (directory / "done").write_text("")  # of an earlier attempt
    (tree / "tasks" / "programs" / "sft.py").write_text(program)
    with pytest.raises(StageFailed, match=f"failed: {cause}. Its log"):
        run_program("sft", directory, Machine())


def test_whatever_is_raised_meanwhile_the_program_and_its_children_are_killed(
    tree: Path, directory: Path
) -> None:
    fake_programs.misbehave(tree, "sft", "spawn")

    def interrupt(line: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_program("sft", directory, Machine(), on_step=interrupt)
    child = int((directory / "child.pid").read_text())
    wait_until(lambda: not is_alive(child))


def test_an_interrupt_that_a_library_swallows_is_not_lost(tree: Path, directory: Path) -> None:
    fake_programs.misbehave(tree, "sft", "slow")
    swallowed: list[str] = []

    def swallow(line: dict) -> None:
        if line["step"] == 2:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except BaseException as error:
                swallowed.append(type(error).__name__)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), launch.interruptible():
        run_program("sft", directory, Machine(), on_step=swallow)
    assert swallowed == ["KeyboardInterrupt"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_program_that_ignores_sigterm_is_killed(
    tree: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GRACE_SECONDS", 0.2)
    program = "import json, signal, sys, time, os\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    program += (
        "open('pid', 'w').write(str(os.getpid()))\nopen('metrics.jsonl', 'w').write(json.dumps({'step': "
        "1}) + '\\n')\ntime.sleep(600)\n"
    )
    (tree / "tasks" / "programs" / "sft.py").write_text(program)

    def interrupt(line: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_program("sft", directory, Machine(), on_step=interrupt)
    assert not is_alive(int((directory / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_program_dies_with_its_parent_even_on_kill_9(tree: Path, directory: Path) -> None:
    program = (
        "import os, time\nopen('pid.new', 'w').write(str(os.getpid()))\nos.rename('pid.new', 'pid')\n"
        "time.sleep(600)\n"
    )
    (tree / "tasks" / "programs" / "sft.py").write_text(program)
    code = (
        "import sys; from pathlib import Path; from tasks.execution import launch, program_environment; from "
        "tasks.config.machine import Machine\n"
    )
    code += f"program_environment.GPU_DEVICES = {program_environment.GPU_DEVICES!r}\n"
    code += "launch.run_program('sft', Path(sys.argv[1]), Machine())"
    parent = subprocess.Popen([sys.executable, "-c", code, str(directory)], cwd=tree)
    wait_until((directory / "pid").exists)
    program_pid = int((directory / "pid").read_text())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not is_alive(program_pid))


def test_the_programs_libraries_are_quiet_and_stay_offline(tree: Path) -> None:
    chosen = program_environment.program_environment(Machine(threads=3))
    assert chosen["OMP_NUM_THREADS"] == "3"
    assert chosen["HF_HUB_OFFLINE"] == "1"
    assert chosen["PYTHONPATH"].split(os.pathsep)[0] == str(tree)
    assert program_environment.program_environment(Machine()).get("OMP_NUM_THREADS") == os.environ.get(
        "OMP_NUM_THREADS"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a GPU is not known by its device files")
@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("gpu", [(), (os.devnull,)])
def test_without_a_gpu_a_program_starts_without_torchs_compiler(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[str, ...], device: Literal["auto", "cpu"]
) -> None:
    monkeypatch.setattr(program_environment, "GPU_DEVICES", gpu)
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    variables = program_environment.program_environment(Machine(device=device))
    assert variables.get("TORCHDYNAMO_DISABLE") == (None if gpu and device == "auto" else "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # a user's own choice stays
    assert program_environment.program_environment(Machine())["TORCHDYNAMO_DISABLE"] == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a GPU is not known by its device files")
def test_bitsandbytes_loads_no_compiler_in_a_programs_environment() -> None:
    code = "import sys, peft; print('torch._inductor.compile_fx' in sys.modules)"
    chosen = program_environment.program_environment(Machine(device="cpu"))
    run = subprocess.run([sys.executable, "-c", code], env=chosen, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]


def test_a_tail_gives_each_line_once_through_half_lines_and_a_rewind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [line["step"] for line in tail.read()] == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert [line["step"] for line in tail.read()] == [3]
    (tmp_path / "new").write_text('{"step": 1}\n')
    os.replace(tmp_path / "new", path)  # what a resumed program does
    assert tail.read() == []
    with path.open("a") as file:
        file.write('{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step": 4, "eval": 1}\nnonsense\n[1]\n')
    assert [line["step"] for line in tail.read()] == [4, 4]
