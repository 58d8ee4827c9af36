"""Test the table of samples in MLflow: uploaded once per sample, complete after a kill, kept in an outage."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.execution import sample_table
from tasks.execution.sample_table import SampleTable
from tasks.tracking.client import Tracker
from tasks.tracking.tracked_run import TrackedRun


@pytest.fixture
def run(connected: Tracker) -> TrackedRun:
    return TrackedRun(connected, connected.start("ppo", {}))


@pytest.fixture
def uploads(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Record each file that is uploaded."""
    found: list[Path] = []
    honest = tracker.upload

    def upload(run_id: str, path: Path, *more: Any) -> None:
        honest(run_id, path, *more)
        found.append(path)

    monkeypatch.setattr(tracker, "upload", upload)
    return found


def line(step: int) -> str:
    answers = [
        {
            "question_id": id,
            "question": f"{id}?",
            "answer": "a\n<b>\u2028",
            "length": 3,
            "ended": True,
            "kl": kl,
        }
        for id, kl in ((7, 0.5), (9, None))
    ]
    return json.dumps({"step": step, "answers": answers}) + "\n"


def rows(run: TrackedRun) -> list[dict[str, Any]]:
    """Return the table as MLflow itself reads it."""
    client, tracker = run.tracker._mlflow, run.tracker
    table = client.load_table(tracker._experiment, run_ids=[str(run.run_id)], artifact_file="samples.json")
    found: list[dict[str, Any]] = table.to_dict("records")
    return found


def test_mlflow_has_each_sample_once_and_is_sent_nothing_else(
    run: TrackedRun, uploads: list[Path], tmp_path: Path
) -> None:
    table, file = SampleTable(run, tmp_path), tmp_path / "samples.jsonl"
    table.upload_new()
    assert uploads == []
    for number, step in enumerate((0, 5, 10), 1):
        with file.open("a") as samples:
            samples.write(line(step))
        for _ in range(3):  # lines of metrics
            table.upload_new()
        assert len(uploads) == number
        assert [row["step"] for row in rows(run)] == [s for s in (0, 5, 10)[:number] for _ in range(2)]
    assert [row["kl"] for row in rows(run)][:1] == [0.5]
    assert rows(run)[0]["answer"] == "a\n<b>\u2028"
    table.upload_new(is_last=True)
    assert len(uploads) == 3


def test_a_program_that_was_killed_leaves_no_sample_twice(run: TrackedRun, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text(line(0) + line(5) + line(10)[:30])  # killed as it wrote
    SampleTable(run, tmp_path).upload_new()
    assert [row["step"] for row in rows(run)] == [0, 0, 5, 5]
    file.write_text(line(0) + line(5))  # rewound by the program that resumes
    resumed = SampleTable(run, tmp_path)
    resumed.upload_new()
    with file.open("a") as samples:
        samples.write(line(10))
    resumed.upload_new(is_last=True)
    assert [row["step"] for row in rows(run)] == [0, 0, 5, 5, 10, 10]
    found = run.tracker.run(str(run.run_id))
    assert found
    assert json.loads(found.tags[sample_table.TAG]) == [{"path": "samples.json", "type": "table"}]


def test_an_outage_delays_the_table_and_does_not_turn_tracking_off(
    run: TrackedRun, uploads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "samples.jsonl").write_text(line(0))
    table, honest = SampleTable(run, tmp_path), run.tracker.upload
    attempts: list[float | None] = []

    def refuse(run_id: str, path: Path, folder: str | None, patience: float | None = None) -> None:
        attempts.append(patience)
        raise ConnectionError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(type(run.tracker), "is_remote", True)
        patch.setattr(run.tracker, "upload", refuse)
        table.upload_new()
        table.upload_new()  # too soon for another attempt
        assert attempts == [0]
        assert run.is_on
        patch.setattr(run.tracker, "upload", honest)
        table.upload_new(is_last=True)
    assert len(uploads) == 1
