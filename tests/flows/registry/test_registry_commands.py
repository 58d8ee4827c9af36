"""Test `alignflow promote`, `rollback`, `models` and `lineage`: what they print and refuse."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from flows import cli, promote
from tasks.config.sections.gates import Promotion
from tasks.tracking import databases, runs
from tasks.tracking.client import Tracker, process_tracker
from tests.tasks.promotion.finished_runs import GOOD, MadeRun, interval, make_run


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


@pytest.fixture
def rounds(home: Path) -> list[MadeRun]:
    """Make rounds 1 and 2 of a flow run, of which the second has lost."""
    home.mkdir()
    databases.lay("mlflow", home / "mlflow.db")
    tracker: Tracker = process_tracker()
    assert tracker.connect()
    with runs.pipeline_run(tracker, "rounds of demo", {}) as parent:
        lost = GOOD | {"gold_win_rate.ppo_vs_predecessor": interval(0.4, 0.35, 0.45)}
        return [make_run(tracker, one, lost if one == 2 else GOOD, parent=parent.run_id) for one in (1, 2)]


TAKEN = (
    "demo 1 is taken: it is the last round that won (78.5 % (76.1 to 80.9, n 500) against SFT, by the gold "
    "scorer)."
)


def test_the_last_round_that_won_is_promoted(
    rounds: list[MadeRun], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["promote"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == TAKEN
    assert last.startswith("PPO of demo 1 (rlhf-policy-demo version 1) is the champion")
    cli.main(["promote", rounds[1].run_id])
    assert capsys.readouterr().out.startswith("PPO of demo 2 (rlhf-policy-demo version 2)\n")


def test_a_flow_says_which_round_it_takes_and_takes_it_again_when_a_person_has_answered(
    rounds: list[MadeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(promote, "flow_run", SimpleNamespace(id="f"))
    monkeypatch.setattr(promote, "heartbeat", nullcontext)
    monkeypatch.setattr(promote, "create_markdown_artifact", lambda text, **_: shown.append(text))
    parent = process_tracker().run(rounds[0].run_id).tags[runs.PARENT]
    for outcome, kl in (("Refused", 0.1), ("Promoted", 9)):
        state = promote.promote.fn(Promotion.model_validate({"gates": {"kl": kl}}), "demo")
        assert (state.name, state.message.startswith(f"{TAKEN} PPO of demo 1 (")) == (outcome, True)
        assert "demo 1 is taken: it is the last round that won" in shown[-1]
        if outcome == "Refused":  # a newer round wins meanwhile
            won = GOOD | {"gold_win_rate.ppo_vs_predecessor": interval(0.6, 0.55, 0.65)}
            make_run(process_tracker(), 3, won, parent=parent)
    monkeypatch.setattr(promote, "flow_run", SimpleNamespace(id="g"))
    assert promote.promote.fn(Promotion(), "demo").message.startswith("demo 3 is taken: ")


def test_a_flow_says_nothing_of_a_run_that_is_no_round(
    made: MadeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(promote, "flow_run", SimpleNamespace(id="f"))
    for _ in range(2):
        found, reason = promote.pin_run(process_tracker(), made.run_id, "")
        assert (found.run_id, reason) == (made.run_id, "")


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
