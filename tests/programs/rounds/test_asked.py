"""Test the program asked: nothing twice, the budget, gold questions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import AskedJob
from tasks.programs.rounds import asked
from tasks.programs.rounds.round_tables import CANDIDATE, write_rows
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.programs.rounds.rows import candidate
from tests.support import tiny

ANSWERS = ["list all files", "copy the two files", "remove a user now"]


def write_candidates(folder: Path, *, count: int = 30, members: Sequence[float] = ()) -> Path:
    """Write candidates with three answers a question, whose members' rewards differ by ``members``."""
    folder.mkdir()
    rows = []
    for number in range(count):
        for draw, answer in enumerate(ANSWERS):
            rewards = [draw * number * one / 10 for one in members]
            reward = float(draw) if members else None
            text = f"{answer} {number}"
            rows.append(candidate(number, text, draw=draw, rewards=rewards, reward=reward))
    write_rows(folder / "candidates.parquet", rows, CANDIDATE)
    return folder


def run_program(folder: Path, inputs: dict[str, Path], **job: Any) -> Run:
    settings = {"seed": 0, "choose": {}, "comparisons": 20} | job
    run = Run(tiny.write_job(folder, "asked", settings, inputs))
    asked.ask(AskedJob.model_validate(run.record), run)
    return run


def rows_of(run: Run) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(run.artifact / "asked.parquet").to_pylist()
    return rows


def metrics_of(run: Run) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run.artifact / "summary.json").read_text())["metrics"]
    return metrics


def test_the_budget_is_asked_and_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    inputs = {"candidates": write_candidates(tmp_path / "candidates")}
    runs = [run_program(tmp_path / name, inputs) for name in "ab"]
    rows = rows_of(runs[0])
    assert len(rows) == len({row["question_id"] for row in rows}) == 20
    assert {row["chosen_by"] for row in rows} == {"random"}
    assert {(row["disagreement"], row["margin"], row["known"]) for row in rows} == {(None, None, "")}
    files = [{path.name: path.read_bytes() for path in run.artifact.iterdir()} for run in runs]
    assert files[0] == files[1]
    assert metrics_of(runs[0])["asked.possible"] == 90


def test_nothing_is_asked_twice_over_rounds(tmp_path: Path) -> None:
    inputs = {"candidates": write_candidates(tmp_path / "candidates")}
    seen: set[str] = set()
    for number in range(4):  # 90 pairs in all, of which a round asks 30
        run = run_program(tmp_path / f"round{number}", inputs, comparisons=40, seed=number)
        inputs[f"before{number + 1}"] = run.artifact
        new = {row["pair_id"] for row in rows_of(run)}
        assert len(new) == 30
        assert not new & seen
        seen |= new
        if number == 2:
            break
    assert len(seen) == 90
    with pytest.raises(InputError, match=r"all such pairs were asked before: raise rounds\.sample\.prompts"):
        run_program(tmp_path / "last", inputs)


def test_too_few_pairs_are_warned_of(tmp_path: Path) -> None:
    run = run_program(tmp_path / "a", {"candidates": write_candidates(tmp_path / "c")}, comparisons=31)
    assert run.warnings == [
        "Only 30 of rounds.comparisons=31 pairs can be asked: raise rounds.sample.prompts, "
        "rounds.sample.answers or rounds.choose.pairs_per_question."
    ]


def test_pairs_on_which_members_disagree_are_asked_first(tmp_path: Path) -> None:
    inputs = {"candidates": write_candidates(tmp_path / "c", members=(1.0, -1.0))}
    run = run_program(tmp_path / "a", inputs, choose={"by": "disagreement"}, comparisons=5)
    rows = rows_of(run)
    # members differ by 2 draws x question number / 10 at most: the last questions, and answers 0 and 2
    assert [row["question_id"] for row in rows] == [29, 28, 27, 26, 25]
    assert {abs(row["margin"]) for row in rows} == {2.0}
    values = [row["disagreement"] for row in rows]
    assert values == sorted(values, reverse=True)
    metrics = metrics_of(run)
    assert metrics["asked.disagreement"] > metrics["asked.disagreement_of_all"] > 0


def test_without_members_disagreement_is_random_and_says_so(tmp_path: Path) -> None:
    inputs = {"candidates": write_candidates(tmp_path / "c")}
    by_chance = run_program(tmp_path / "a", inputs)
    run = run_program(tmp_path / "b", inputs, choose={"by": "disagreement"})
    assert rows_of(run) == rows_of(by_chance)
    (warning,) = run.warnings
    assert "this round's are random" in warning


def test_pairs_that_members_settle_are_left_out(tmp_path: Path) -> None:
    inputs = {"candidates": write_candidates(tmp_path / "c", members=(1.0, 1.0))}
    run = run_program(tmp_path / "a", inputs, choose={"confidence": 0.9, "pairs_per_question": 3})
    # sigmoid(2.197) = .9: differences of a draw are number / 10, of two draws number / 5
    settled = sum(number / 10 >= 2.1973 for number in range(30)) * 2
    settled += sum(number / 5 >= 2.1973 for number in range(30))
    assert metrics_of(run)["asked.settled"] == settled == 35
    assert metrics_of(run)["asked.possible"] == 90 - settled
    assert metrics_of(run)["asked.asked_before"] == 0


def test_gold_questions_are_mixed_in_and_never_come_again(tmp_path: Path) -> None:
    data = tiny.data_folder(tmp_path / "data", 24)
    best = {row["question_id"]: row for row in pq.read_table(data / "finetune.parquet").to_pylist()}
    inputs = {"candidates": write_candidates(tmp_path / "c"), "data": data}
    run = run_program(tmp_path / "a", inputs, gold_questions=10)
    rows = rows_of(run)
    gold = [row for row in rows if row["known"]]
    assert (len(gold), len(rows)) == (10, 30)
    for row in gold:
        own = best[row["question_id"]]
        assert (row["prompt"], row[row["known"]]) == (own["prompt"], own["answer"])
        assert {row["first_policy"], row["second_policy"]} == {"votes", "another question"}
    assert {row["known"] for row in gold} == {"first", "second"}
    places = [number for number, row in enumerate(rows) if row["known"]]
    assert places != [*range(10)]
    assert places != [*range(20, 30)]
    asked_alone = [row for row in rows if not row["known"]]
    assert asked_alone == rows_of(run_program(tmp_path / "b", inputs)), "they change no other question"
    again = run_program(tmp_path / "d", inputs | {"before1": run.artifact}, gold_questions=20)
    new = [row for row in rows_of(again) if row["known"]]
    assert not {row["question_id"] for row in new} & {row["question_id"] for row in gold}
    assert any("new gold questions" in text for text in again.warnings), "24 questions, 10 are used"
