"""Test rounds that wait for people, as whole runs of the command with fake programs.

`alignflow rounds` runs in processes of its own, whose tree has the fake programs; commands that start no
program are called in this process.
"""

import json
import os
import sqlite3
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from flows import cli
from tests.support import fake_programs
from tests.tasks.rounds.made_rounds import make_pairs
from tests.tasks.rounds.people_programs import make_tree

pytestmark = pytest.mark.slow

NUM_PAIRS = 6
PEOPLE = "rounds.labels={kind: people, gold_questions: 1, least: 4}"
ROUND = ["rounds", "demo", "--set", "rounds.count=1", "--set", PEOPLE]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("labelled") / "tree", NUM_PAIRS)


@pytest.fixture
def home(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home of its own, which is also that of the commands that are called in this process."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which commands change
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_")):
            del os.environ[name]
    os.environ["ALIGNFLOW_HOME"] = str(tree.parent / "home")
    monkeypatch.chdir(tree.parent)  # commands change the folder too
    return tree.parent / "home"


def artifacts(home: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the manifests of a home's artifacts by stage, oldest first."""
    found = defaultdict(list)
    for path in home.glob("objects/*/*/manifest.json"):
        found[path.parents[1].name].append(json.loads(path.read_text()))
    return {stage: sorted(ones, key=lambda one: one["created"]) for stage, ones in found.items()}


def statuses(home: Path) -> dict[str, int]:
    """Return how many of the runs that no stage has are in each status in MLflow."""
    with sqlite3.connect(home / "mlflow.db") as database:
        rows = database.execute(
            "select status, count(*) from runs where run_uuid not in "
            "(select run_uuid from tags where key = 'stage') group by status"
        ).fetchall()
    database.close()
    return dict(rows)


def test_a_round_waits_for_people_and_is_rebuilt_without_a_label_that_is_withdrawn(
    tree: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_round() -> tuple[int, str, str]:
        return fake_programs.run_cli(tree, home, *ROUND)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        return (status, *capsys.readouterr())

    # 1. The command ends with a status of its own; the round's run in MLflow has not failed.
    status, _, error = run_round()
    assert (status, error) == (
        3,
        f"alignflow: {NUM_PAIRS} of {NUM_PAIRS} pairs of round 1 of demo wait for labels: "
        "`alignflow label demo`, then the same command goes on\n",
    )
    assert "comparisons" not in artifacts(home)
    assert statuses(home) == {"FINISHED": 1, "SCHEDULED": 2}  # round 0; the round and the flow's run

    # 2. Too few labels do not let it go on; with enough a person may say that they are all.
    rows = [{"pair_id": one["pair_id"], "verdict": "first", "rater": "Ann"} for one in make_pairs(NUM_PAIRS)]
    file = home.parent / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert call("labels", "import", "demo", str(file))[1] == (
        "3 labels are added to round 1 of demo: 3 of 6 pairs have one\n"
    )
    status, _, error = call("labels", "finish", "demo", "--by", "Ann")
    assert (status, error) == (
        2, "alignflow: round 1 of demo has labels of 3 pairs, and rounds.labels.least is 4\n",
    )  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[3:5]))
    assert call("labels", "import", "demo", str(file))[0] == 0
    assert "the same `alignflow rounds` goes on" in call("labels", "finish", "demo", "--by", "Ann")[1]

    # 3. The same command goes on with them.
    before = artifacts(home)
    assert run_round()[::2] == (0, "")
    after = artifacts(home)
    assert [len(after[stage]) for stage in ("candidates", "asked", "comparisons", "ppo")] == [1, 1, 1, 2]
    assert after["asked"] == before["asked"]
    exported = home.parent / "out.jsonl"
    assert call("labels", "export", "demo", str(exported))[0] == 0
    held = [json.loads(line) for line in exported.read_text().splitlines()]
    assert [one["pair_id"] for one in held] == [row["pair_id"] for row in rows[:5]]
    status, _, error = call("labels", "import", "demo", str(file))
    assert (status, error) == (
        2, "alignflow: round 1 of demo has gone on with the labels that it had\n",
    )  # fmt: skip
    out = call("labels", "agreement", "demo")[1]
    assert "Ann" in out
    assert "Cohen's kappa of the two with most pairs: 0.50 (0.20 to 0.80, 4 pairs)" in out

    # 4. What was built on a label is found, and is built anew without it.
    label = held[0]["label_id"]
    built = json.loads(call("lineage", "--label", label, "--json")[1])
    assert [one["comparisons"]["key"] for one in built] == [after["comparisons"][0]["key"]]
    learnt = {(one["stage"], one["key"]) for one in built[0]["learnt"]}
    assert learnt == {(stage, after[stage][-1]["key"]) for stage in ("reward", "ppo")}
    out = call("labels", "withdraw", "demo", label[:8], "--why", "a mistake", "--by", "Ben")[1]
    assert after["ppo"][-1]["key"][:12] in out
    assert run_round()[0] == 0  # still finished, by what Ann has said
    last = artifacts(home)
    assert [len(last[stage]) for stage in ("asked", "comparisons", "reward", "ppo")] == [1, 2, 3, 3]
    assert (
        json.loads(call("lineage", "--label", label, "--json")[1])[0]["comparisons"]
        == built[0]["comparisons"]
    )
