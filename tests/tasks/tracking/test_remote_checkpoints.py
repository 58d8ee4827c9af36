"""Test checkpoints in MLflow: uploaded while the program writes on, restored elsewhere, never partial."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from tasks.tracking import remote_checkpoints, runs
from tasks.tracking.client import Tracker
from tasks.tracking.tracked_run import TrackedRun


@pytest.fixture
def run(connected: Tracker) -> TrackedRun:
    return TrackedRun(connected, connected.start("sft", {runs.KEY: "k"}))


def at_step(directory: Path, step: int) -> Path:
    """Create a stage's folder whose newest checkpoint is of ``step``."""
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    folder = directory / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "tensors.safetensors").write_bytes(b"%d" % step * 1000)
    (folder / "state.json").write_text(json.dumps({"step": step}))
    (directory / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": one}) + "\n" for one in range(1, step + 1))
    )
    (directory / "samples.jsonl").write_text(json.dumps({"step": step, "answers": []}) + "\n")
    return directory


def resumed(run: TrackedRun) -> TrackedRun:
    """Return the same run as the next machine sees it."""
    found = run.tracker.run(str(run.run_id))
    assert found
    return TrackedRun(run.tracker, run.run_id, resumed=True, tags=found.tags)


def contents(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_another_machine_gets_the_newest_checkpoint_and_its_metrics(run: TrackedRun, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for slot, step in enumerate((10, 20, 30)):
        remote_checkpoints.upload(run, at_step(here, step), slot % 2)
    there = tmp_path / "there"
    there.mkdir()
    assert remote_checkpoints.restore(resumed(run), there)
    assert contents(there) == contents(here)


def test_nothing_is_restored_where_there_is_nothing_newer(run: TrackedRun, tmp_path: Path) -> None:
    assert not remote_checkpoints.restore(resumed(run), tmp_path)
    remote_checkpoints.upload(run, at_step(tmp_path / "a", 10), 0)
    for step, restored in ((10, False), (20, False), (5, True)):
        assert remote_checkpoints.restore(resumed(run), at_step(tmp_path / "b", step)) == restored
    assert remote_checkpoints.newest_step(tmp_path / "b" / "checkpoints") == 10


def test_an_upload_that_was_cut_off_leaves_the_checkpoint_before(
    run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote_checkpoints.upload(run, at_step(tmp_path / "a", 10), 0)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    at_step(tmp_path / "a", 20)
    with monkeypatch.context() as patched:
        patched.setattr(run.tracker, "set_tags", cut)
        with pytest.raises(KeyboardInterrupt):
            remote_checkpoints.upload(run, tmp_path / "a", 1)
    assert remote_checkpoints.restore(resumed(run), tmp_path / "b")
    assert remote_checkpoints.newest_step(tmp_path / "b" / "checkpoints") == 10


def test_a_damaged_checkpoint_is_not_restored(run: TrackedRun, tmp_path: Path) -> None:
    remote_checkpoints.upload(run, at_step(tmp_path / "a", 10), 0)
    uri = run.tracker._mlflow.get_run(run.run_id).info.artifact_uri.removeprefix("file://")
    next(Path(uri).rglob("tensors.safetensors")).write_bytes(b"altered")
    at_step(tmp_path / "b", 5)
    assert not remote_checkpoints.restore(resumed(run), tmp_path / "b")
    assert remote_checkpoints.newest_step(tmp_path / "b" / "checkpoints") == 5


def test_a_checkpoint_is_taken_whole_while_its_program_replaces_it(tmp_path: Path) -> None:
    """The program deletes what is being read: every copy is one checkpoint, never parts of two."""
    here, stop = tmp_path / "here", threading.Event()
    checkpoints = here / "checkpoints"
    at_step(here, 1)

    def train() -> None:
        for step in range(2, 100_000):
            if stop.is_set():
                return
            new = checkpoints / f"new-{step}"
            new.mkdir()
            for name in ("state.json", "tensors.safetensors"):
                (new / name).write_text(str(step))
            new.rename(checkpoints / f"step-{step:08d}")
            for old in checkpoints.glob("step-*"):
                if not old.name.endswith(f"{step:08d}"):
                    old.rename(checkpoints / f"old-{old.name}")
                    shutil.rmtree(checkpoints / f"old-{old.name}")

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(30):
            step = remote_checkpoints._copy_newest(here, tmp_path / "taken")
            texts = {
                path.name: path.read_text()
                for path in (tmp_path / "taken" / "checkpoints" / f"step-{step:08d}").iterdir()
            }
            assert step == 1 or texts == {"state.json": str(step), "tensors.safetensors": str(step)}
            time.sleep(0.002)
    finally:
        stop.set()
        thread.join()


def test_while_a_stage_runs_its_checkpoints_are_uploaded_each_once(
    run: TrackedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[int] = []
    monkeypatch.setattr(remote_checkpoints, "upload", lambda run, directory, slot: uploaded.append(slot))
    with remote_checkpoints.uploading_checkpoints(run, at_step(tmp_path, 10), 0.02):
        time.sleep(0.2)
        at_step(tmp_path, 20)
        time.sleep(0.2)
    time.sleep(0.1)
    assert uploaded == [0, 1]
    with remote_checkpoints.uploading_checkpoints(run, at_step(tmp_path, 30), 0):
        time.sleep(0.1)
    assert uploaded == [0, 1]


def test_when_the_stage_has_ended_its_checkpoints_go(run: TrackedRun, tmp_path: Path) -> None:
    remote_checkpoints.upload(run, at_step(tmp_path, 10), 0)
    assert [file.path for file in run.tracker._mlflow.list_artifacts(run.run_id)] == ["checkpoint-0"]
    remote_checkpoints.discard(run)
    assert run.tracker._mlflow.list_artifacts(run.run_id) == []
