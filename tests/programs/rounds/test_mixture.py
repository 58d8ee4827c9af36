"""Test how votes and comparisons are mixed."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import MixtureJob
from tasks.dataset.tables import COLUMNS
from tasks.programs.rounds import mixture
from tasks.programs.rounds.round_tables import COMPARISON, MIXTURE, write_rows
from tasks.programs.runtime.program import Run
from tests.support import tiny


def votes(count: int) -> pa.Table:
    rows = [
        {"question_id": number // 2, "prompt": "q", "chosen": f"c{number}", "rejected": "r", "gap": 2.0}
        for number in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(COLUMNS["reward"].items()))


def comparisons(*questions: int) -> pa.Table:
    rows = [
        {
            "question_id": number,
            "prompt": "q",
            "chosen": "a",
            "rejected": "b",
            "gap": 1.0,
            "pair_id": f"{number}",
        }
        for number in questions
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(COMPARISON.items()))


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 30), (0.25, 10), (0.8, 120)])
def test_so_many_votes_are_in_as_the_share_says(share: float, expected: int) -> None:
    table = mixture.mix(votes(400), [comparisons(*range(1000, 1030))], old_share=share, seed=0)
    assert Counter(table["origin"].to_pylist()) == Counter({"votes": expected, "round 1": 30})


def test_rows_of_a_question_stand_together_in_the_order_of_ids() -> None:
    table = mixture.mix(votes(40), [comparisons(15, 3, 900), comparisons(3, 15)], old_share=0.8, seed=0)
    ids = table["question_id"].to_pylist()
    assert ids == sorted(ids)
    assert table.schema == pa.schema(MIXTURE.items())
    of_three = [row for row in table.to_pylist() if row["question_id"] == 3 and row["pair_id"]]
    assert [row["origin"] for row in of_three] == ["round 1", "round 2"]
    assert all(row["chosen_older"] is None and row["gap"] == 1.0 for row in of_three)
    assert {row["pair_id"] for row in table.to_pylist() if row["origin"] == "votes"} == {None}


def test_votes_are_drawn_by_question_and_more_of_them_hold_the_fewer() -> None:
    few, many = (
        [
            row["chosen"]
            for row in mixture.mix(
                votes(400), [comparisons(*range(900, 920))], old_share=share, seed=3
            ).to_pylist()
            if row["origin"] == "votes"
        ]
        for share in (0.5, 0.8)
    )
    assert (len(few), len(many)) == (20, 80)
    assert set(few) < set(many)
    assert all(Counter(int(name[1:]) // 2 for name in few)[question] == 2 for question in
               {int(name[1:]) // 2 for name in few})  # fmt: skip
    other = mixture.mix(votes(400), [comparisons(*range(900, 920))], old_share=0.5, seed=4)
    assert [row["chosen"] for row in other.to_pylist() if row["origin"] == "votes"] != few


def run_program(folder: Path, inputs: dict[str, Path], **job: Any) -> Run:
    run = Run(tiny.write_job(folder, "mixture", {"seed": 0, "old_share": 0.5} | job, inputs))
    mixture.write_mixture(MixtureJob.model_validate(run.record), run)
    return run


def test_the_program_mixes_all_rounds_in_their_order_and_warns_of_too_few_votes(tmp_path: Path) -> None:
    inputs = {"data": tiny.data_folder(tmp_path / "data", 5)}  # 10 pairs
    for number in (*range(2, 12), 1):
        inputs[f"comparisons{number}"] = tmp_path / f"c{number}"
        (tmp_path / f"c{number}").mkdir()
        write_rows(
            tmp_path / f"c{number}" / "comparisons.parquet", comparisons(900 + number).to_pylist(), COMPARISON
        )
    runs = [run_program(tmp_path / name, inputs) for name in "ab"]
    table = pq.read_table(runs[0].artifact / "reward.parquet").to_pylist()
    assert [(row["question_id"], row["origin"]) for row in table[10:]] == [
        (900 + number, f"round {number}") for number in range(1, 12)
    ]
    summary = json.loads((runs[0].artifact / "summary.json").read_text())
    assert summary["metrics"]["mixture.votes"] == 10
    assert summary["warnings"] == [
        "The reward split has 10 pairs of the 11 that rounds.old_share=0.5 asks for beside 11 comparisons: "
        "all of them are used."
    ]
    assert len({(run.artifact / "reward.parquet").read_bytes() for run in runs}) == 1


def test_without_votes_the_data_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    write_rows(tmp_path / "c" / "comparisons.parquet", comparisons(7, 8).to_pylist(), COMPARISON)
    run = run_program(tmp_path / "a", {"comparisons1": tmp_path / "c"}, old_share=0.0)
    assert pq.read_table(run.artifact / "reward.parquet")["question_id"].to_pylist() == [7, 8]
    assert run.warnings == []
