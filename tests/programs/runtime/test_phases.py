"""Test progress between optimizer steps: written during long phases, shown on the screen, not in the
artifact.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.display import terminal
from tasks.execution.metrics_tail import MetricsTail
from tasks.programs.runtime import program
from tasks.programs.runtime.program import Run
from tasks.rlhf.compute import distributed
from tasks.system import events
from tests.support import tiny


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(program, "PHASE_SECONDS", 0.0)
    return Run(tiny.write_job(tmp_path / "run", "sft", {}, {}))


def written(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def test_a_phase_is_told_beside_the_steps_and_is_none(run: Run) -> None:
    tell = run.phase("tokenising")
    tell(5, 10)
    run.log(1, 3, loss=2.0)
    tell(10, 10)
    run.log(2, 3, loss=1.0)
    assert [(line.get("phase"), line["step"], line["total"]) for line in written(run)] == [
        ("tokenising", 5, 10), (None, 1, 3), ("tokenising", 10, 10), (None, 2, 3),
    ]  # fmt: skip
    assert (run.last()["loss"], run.mean("loss")) == (1.0, 1.5)
    run.finish({})
    kept = [json.loads(line) for line in (run.artifact / "metrics.jsonl").read_text().splitlines()]
    assert kept == [{"step": 1, "total": 3, "loss": 2.0}, {"step": 2, "total": 3, "loss": 1.0}]
    run.rewind(1)
    assert [line["step"] for line in written(run)] == [1]


def test_a_short_phase_says_nothing_and_a_long_one_once_in_a_while(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(program, "PHASE_SECONDS", 1.0)
    monkeypatch.setattr(program.time, "monotonic", lambda: now[0])
    short, long = run.phase("short"), run.phase("long")
    for number in range(1, 101):
        now[0] = 0.009 * number
        short(number, 100)
    assert not (run.directory / "metrics.jsonl").exists()
    for number in range(1, 101):
        now[0] = 0.9 + 0.1 * number
        long(number, 100)
    assert [line["step"] for line in written(run)][:3] == [1, 11, 21]


def test_the_same_count_of_two_phases_is_two_lines(run: Run) -> None:
    tail = MetricsTail(run.directory / "metrics.jsonl")
    for phase in ("tokenising", "attacks"):
        run.phase(phase)(1, 2)
    run.log(1, 2)
    assert [line.get("phase") for line in tail.read()] == ["tokenising", "attacks", None]


def test_a_phase_that_comes_again_is_told_again(run: Run) -> None:
    """Each evaluation counts from the start; steps that a resumed program repeats are not shown again."""
    tail = MetricsTail(run.directory / "metrics.jsonl")
    for step in (1, 2):
        run.phase("held-out answers")(128, 512)
        run.log(step, 2)
    assert [line.get("phase") for line in tail.read()] == ["held-out answers", None] * 2
    run.rewind(2)
    assert tail.read() == []


def test_the_screen_names_the_phase_and_starts_its_rate_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.drawing(terminal.Screen()):
        events.tell("start", "reward", shown=("loss",))
        for seconds, line in (
            (20, {"step": 1000, "total": 5000, "phase": "tokenising"}),
            (40, {"step": 3000, "total": 5000, "phase": "tokenising"}),
            (60, {"step": 1, "total": 400, "loss": 0.7}),
            (80, {"step": 21, "total": 400, "loss": 0.5}),
            (100, {"step": 3, "total": 80, "phase": "attacks"}),
        ):
            now[0] = seconds
            events.tell("step", "reward", line=line)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if " reward " in line]
    assert lines == [
        "reward tokenising 1,000/5,000",
        "reward tokenising 3,000/5,000 100.0/s 20.0 s left",
        "reward 1/400 loss 0.700",
        "reward 21/400 1.0/s 6 min 19 s left loss 0.500",
        "reward attacks 3/80",
    ]


def test_parts_that_are_computed_one_by_one_are_told() -> None:
    told: list[tuple[int, int]] = []
    found = distributed.map_over_ranks(
        [1, 2, 3],
        lambda part: torch.tensor(part),
        report_progress=lambda done, total: told.append((done, total)),
    )
    assert [x.item() for x in found] == [1, 2, 3]
    assert told == [(1, 3), (2, 3), (3, 3)]
