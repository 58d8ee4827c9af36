"""Test run_stage with real processes: cache hits, rebuilding, resuming, concurrent runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.artifacts import code_version
from tasks.artifacts.artifact import Artifact, Step, user_artifact
from tasks.artifacts.store import Store
from tasks.config.jobs import PpoJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import program_environment, program_forks
from tasks.execution.run_stage import RunContext, run_stage
from tasks.system import events
from tasks.system.errors import InputError, StageFailed
from tests.support import fake_programs

SEAT = RunContext(Machine(checkpoint_steps=1))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(code_version, "ROOT", made)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    yield made
    program_forks.stop()


@pytest.fixture
def store(tree: Path, tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def heard() -> Iterator[list[str]]:
    kinds: list[str] = []
    unlisten = events.listen(lambda event: kinds.append(event.kind))
    yield kinds
    unlisten()


def step(tree: Path, **settings: object) -> Step:
    return Step(
        "ppo",
        PpoJob.of(Pipeline.model_validate(settings)),
        {"data": user_artifact(tree / "deployments")},
        shown=("kl",),
    )


def run(tree: Path, **settings: object) -> Artifact:
    return run_stage(step(tree, **settings), SEAT)


def test_the_second_time_nothing_runs(tree: Path, store: Store, heard: list[str]) -> None:
    first = run(tree)
    assert heard == ["start", *["step"] * 5, "built"]
    fake_programs.misbehave(tree, "ppo", "fail")
    second = run(tree)
    assert heard[-2:] == ["start", "reused"]
    assert (first["cached"], second["cached"]) == (False, True)
    assert second["digest"] == first["digest"]
    assert first["metrics"]["ppo.kl"] == 0.5
    assert json.dumps(second)
    assert not store.partial(first["key"]).exists()


def test_a_programs_warning_is_said_when_its_artifact_is_built_and_whenever_it_is_used(tree: Path) -> None:
    fake_programs.misbehave(tree, "ppo", "warn")
    said: list[str] = []
    unlisten = events.listen(
        lambda event: said.append(event.about["text"]) if event.kind == "warning" else None
    )
    assert run(tree)["warnings"] == ["No answer ended."]
    assert said == ["ppo: No answer ended."]
    assert run(tree)["cached"]
    assert said == ["ppo: No answer ended."] * 2
    unlisten()


def test_changed_settings_code_or_input_build_anew(tree: Path) -> None:
    keys = {run(tree)["key"], run(tree, seed=1)["key"], run(tree, ppo={"steps": 3})["key"]}
    fake_programs.write_program(tree, "ppo", more="X = 1")
    keys.add(run(tree)["key"])
    (tree / "deployments" / "more.txt").write_text("more")
    keys.add(run(tree)["key"])
    assert len(keys) == 5
    fake_programs.write_program(tree, "ppo", more="X = 1  # the same")
    assert run(tree)["cached"]


@pytest.mark.parametrize("damage", ["alter", "delete", "truncate"])
def test_a_damaged_artifact_is_noticed_quarantined_and_made_again(
    tree: Path, store: Store, heard: list[str], damage: str
) -> None:
    first = run(tree)
    weights = store.entry("ppo", first["key"]) / ("weights.json" if damage != "truncate" else "manifest.json")
    if damage == "delete":
        weights.unlink()
    else:
        weights.write_text(weights.read_text()[:20])
    again = run(tree)
    assert "warning" in heard
    assert (again["cached"], again["digest"]) == (False, first["digest"])
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert run(tree)["cached"]


RUN = """
import sys
from pathlib import Path
sys.path.append(sys.argv[2])  # the tests; the tree comes first
from tests.tasks import test_run_stage
print(test_run_stage.run(Path(sys.argv[1]))["cached"], flush=True)
"""


def start(tree: Path, store: Store) -> "subprocess.Popen[str]":
    """Start the same stage in another process."""
    environment = fake_programs.environment(tree, store.root)
    command = [sys.executable, "-c", RUN, str(tree), str(fake_programs.ROOT)]
    return subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_that_want_the_same_build_it_once(tree: Path, store: Store) -> None:
    fake_programs.misbehave(tree, "ppo", "slow")
    racing = [start(tree, store), start(tree, store)]
    said = sorted(process.communicate(timeout=900)[0].strip() for process in racing)
    assert said == ["False", "True"]


def test_kill_9_leaves_no_lock_and_the_next_run_resumes_to_the_same_bytes(
    tree: Path, store: Store, heard: list[str]
) -> None:
    uninterrupted = run(tree)
    os.rename(store.entry("ppo", uninterrupted["key"]), tree / "aside")
    fake_programs.misbehave(tree, "ppo", "hang-at 3")
    partial = store.partial(uninterrupted["key"])
    process = start(tree, store)
    deadline = time.monotonic() + 900
    while not (partial / "taken.txt").exists() or "3" not in (partial / "taken.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (partial / "artifact" / "half.bin").write_text("half")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    killed = time.monotonic()
    with store.lock(uninterrupted["key"]):  # the program has it until it, too, is gone
        assert time.monotonic() - killed < 100
    fake_programs.misbehave(tree, "ppo", "")
    heard.clear()
    steps: list[int] = []
    unlisten = events.listen(
        lambda event: steps.append(event.about["line"]["step"]) if event.kind == "step" else None
    )
    resumed = run(tree)
    unlisten()
    assert "resume" in heard
    assert "wait" not in heard
    assert steps == [1, 2, 3, 4, 5]  # each once: 3 was logged by the killed program, and taken again
    assert resumed["digest"] == uninterrupted["digest"]


def test_a_finished_program_is_committed_without_running_it_again(
    tree: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Store, "commit", die)
        with pytest.raises(KeyboardInterrupt):
            run(tree)
    fake_programs.misbehave(tree, "ppo", "fail")
    assert run(tree)["metrics"]["ppo.kl"] == 0.5


def test_bad_input_leaves_nothing_behind(tree: Path, store: Store, heard: list[str]) -> None:
    fake_programs.misbehave(tree, "ppo", "input")
    with pytest.raises(InputError):
        run(tree)
    assert heard[-1] == "failed"
    assert not store.partial(step(tree).recipe.key).exists()
    assert not (store.root / "objects").exists()


def test_a_failed_stage_leaves_its_log_and_is_tried_again(tree: Path, store: Store) -> None:
    fake_programs.misbehave(tree, "ppo", "fail")
    with pytest.raises(StageFailed):
        run(tree)
    assert (store.partial(step(tree).recipe.key) / "log.txt").exists()
    assert not (store.root / "objects").exists()
    fake_programs.misbehave(tree, "ppo", "")
    assert not run(tree)["cached"]


def test_the_job_a_program_reads(tree: Path, store: Store) -> None:
    fake_programs.misbehave(tree, "ppo", "fail")
    with pytest.raises(StageFailed):
        run(tree, ppo={"steps": 7})
    job = json.loads((store.partial(step(tree, ppo={"steps": 7}).recipe.key) / "job.json").read_text())
    assert job["stage"] == "ppo"
    assert job["job"]["ppo"]["steps"] == 7
    assert job["inputs"] == {"data": str(tree / "deployments")}
    assert job["machine"]["checkpoint_steps"] == 1
