"""Test `alignflow promote`, `rollback`, `models` and `lineage`: what they print and refuse."""

import json
import os
from pathlib import Path

import pytest

from flows import cli
from tasks.tracking import databases
from tasks.tracking.client import Tracker, process_tracker
from tests.tasks.promotion.finished_runs import GOOD, MadeRun, make_run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    monkeypatch.setattr(os, "environ", dict(os.environ))  # which commands change
    for name in list(os.environ):
        if name.startswith(("PREFECT_", "MLFLOW_")):
            monkeypatch.delenv(name)
    os.environ["ALIGNFLOW_HOME"] = str(place)
    return place


@pytest.fixture
def made(home: Path) -> MadeRun:
    """Make a finished run of a policy that passes all gates, and a newer one whose KL is too high."""
    home.mkdir()
    databases.lay("mlflow", home / "mlflow.db")
    tracker: Tracker = process_tracker()
    assert tracker.connect()
    run = make_run(tracker, 1)
    make_run(tracker, 2, GOOD | {"ppo.kl": 30.0})
    return run


def test_from_promotion_to_lineage(made: MadeRun, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        return (status, *capsys.readouterr())

    status, out, error = run("promote")
    assert status == 1
    assert "kl " in out
    assert "kl: PPO is up to 30.00 nats per answer away from SFT: 10.00 over the budget" in error
    assert run("promote", made.run_id, "--set", "promotion.approval=person")[0] == 0
    status, out, error = run("promote", made.run_id, "--set", "promotion.approval=person", "--yes")
    assert (status, error) == (0, "")
    assert "(rlhf-policy-demo version 2) is the champion, the first one, decided by" in out
    status, out, _ = run("models")
    rows = [line.split() for line in out.splitlines()]
    assert rows[1][:4] == ["rlhf-policy-demo", "2", "champion", "ppo"]
    assert rows[2][:3] == ["rlhf-policy-demo", "1", "ppo"]
    assert "refused by the gates" in out
    assert run("rollback") == (
        2, "", "alignflow: Version 2 of rlhf-policy-demo is its first champion: --to names another version\n",
    )  # fmt: skip
    status, out, _ = run("lineage")
    assert out.startswith("rlhf-policy-demo version 2 (champion)\n")
    assert f"policy: ppo {made.manifests['ppo']['key'][:12]}" in out
    assert run("lineage", "rlhf-policy-demo@champion")[1] == out == run("lineage", "rlhf-policy-demo/2")[1]
    found = json.loads(run("lineage", "--json")[1])
    assert found["policy"]["key"] == made.manifests["ppo"]["key"]
    out = run("lineage", made.manifests["data"]["digest"][:8])[1]
    assert "model versions that have learnt from it: 1" in out
    out = run("lineage", "--post", "51")[1]
    assert "evaluation: for evaluation only" in out
    assert "model versions that have learnt from it: none" in out
    assert "in no data" in run("lineage", "--post", "999")[1]
    for what, sentence in {
        "rlhf-policy-demo/9": "no model version rlhf-policy-demo/9",
        "abcdef0": "No artifact",
    }.items():
        status, _, error = run("lineage", what)
        assert (status, sentence in error) == (2, True), error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["promote", "--set", "sft.epochs=2"], "settings are fixed but for promotion"),
        (["promote"], "There are no runs in"),
        (["models"], "There are no runs in"),
        (["lineage", "x", "--post", "1"], "not two of them"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    arguments: list[str], sentence: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not home.exists()
