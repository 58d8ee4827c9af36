"""Test a person's round on real servers: suspended, labelled in a browser, resumed and traced."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from mlflow import MlflowClient
from playwright.sync_api import expect
from prefect.client.schemas.objects import StateType

from tasks.rounds.label_round import ASKED
from tests.support import fake_programs
from tests.support.fake_programs import wait_until
from tests.support.installation import Installation
from tests.support.pages.browser import open_browser
from tests.tasks.rounds.people_programs import make_tree

pytestmark = pytest.mark.slow

NUM_PAIRS = 20
VERDICTS = {"1": "", "2": "", "t": "tie", "b": "both_bad", "s": "skip"}  # by key; "": an answer


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Run both servers over SQLite, with all deployments, and a worker that takes one flow run at a time."""
    root = tmp_path_factory.mktemp("labels")
    made = Installation(root, make_tree(root / "tree", NUM_PAIRS), "", "")
    try:
        made.start_worker("cpu", "cpu-1", "--limit", "1")
        yield made
    finally:
        made.stop()


def start(installation: Installation) -> UUID:
    """Start a run of one round, all of whose stages run in its process."""
    with installation.client() as client:
        config = dict(client.read_deployment_by_name("rounds/demo").parameters["config"])
    labels = {"kind": "people", "gold_questions": 1, "least": 10}
    rounds = config["rounds"] | {"count": 1, "labels": labels, "promote": False}
    return installation.trigger("rounds/demo", config=config | {"rounds": rounds, "pools": {}})


def is_suspended(installation: Installation, run: UUID) -> bool:
    state = installation.read_run(run).state
    assert state is not None
    assert not state.is_final(), state.message
    return state.type == StateType.PAUSED


def waiting_statuses(installation: Installation) -> list[str]:
    """Return the statuses in MLflow of the runs of rounds whose pairs people label."""
    mlflow = MlflowClient(installation.mlflow)
    experiments = [mlflow.get_experiment_by_name("alignflow").experiment_id]
    return [run.info.status for run in mlflow.search_runs(experiments, f"tags.`{ASKED}` LIKE '%'")]


def cli(installation: Installation, *arguments: str) -> str:
    """Run the command line on another machine than the worker's; return what it prints."""
    home = fake_programs.environment(installation.tree, installation.root / "laptop")
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=installation.root,
        env={**home, **installation.login},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def label_by_keyboard(address: str) -> str:
    """Label all pairs in a browser, with every key; return the keys whose verdicts hold."""
    keys = ("12tbs" * NUM_PAIRS)[:NUM_PAIRS]
    with open_browser() as browser:
        page = browser.new_page()
        page.goto(address)
        page.fill("#name", "Ann")
        page.keyboard.press("Enter")
        page.wait_for_selector("#pair:not([hidden])")
        for count, key in enumerate(keys, start=1):
            page.keyboard.press(key)
            expect(page.locator("#done")).to_have_text(str(count), timeout=400_000)
            if count == 7:  # a mistake
                page.keyboard.press("u")
                expect(page.locator("#done")).to_have_text(str(count - 1), timeout=400_000)
                page.keyboard.press(key)
                expect(page.locator("#done")).to_have_text(str(count), timeout=400_000)
        page.wait_for_selector("#end:not([hidden])")
        assert page.inner_text("#end-title") == "All pairs have a label"
    return keys


def test_a_person_labels_the_pairs_of_a_round_by_keyboard_and_the_flow_goes_on(
    installation: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in installation.login.items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)

    # 1. The flow run is suspended until the pairs are labelled, and holds no worker.
    run = start(installation)
    wait_until(lambda: is_suspended(installation, run), every=0.5)
    wait_until(lambda: not installation.flow_processes(run))
    assert waiting_statuses(installation) == ["SCHEDULED"]  # in MLflow it has not failed

    # 2. A person labels them on another machine.
    log = installation.root / "label.txt"
    laptop = installation.root / "laptop"
    server = installation.start_cli(log, laptop, "label", "demo", "--port", "0", **installation.login)
    wait_until(lambda: "Ctrl-C" in log.read_text() or server.poll() is not None)
    address = re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", log.read_text())
    assert address, log.read_text()
    keys = label_by_keyboard(address.group())

    # 3. The run goes on by itself, and ends.
    assert installation.wait_for_run(run).state_type == StateType.COMPLETED
    server.send_signal(signal.SIGINT)
    assert server.wait(400) == 0
    assert log.read_text().splitlines()[-1] == "20 labels by Ann; every pair has one."

    # 4. The labels are those of the keys, and lineage says what has learnt from them.
    cli(installation, "labels", "export", "demo", str(tmp_path / "labels.jsonl"))
    labels = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    for key, one in zip(keys, labels, strict=True):
        other = "second" if one["shown_first"] == "first" else "first"
        assert one["verdict"] == (VERDICTS[key] or {"1": one["shown_first"], "2": other}[key])
    assert {(one["rater"], one["source"]) for one in labels} == {("Ann", "people")}
    (made,) = json.loads(cli(installation, "lineage", "--label", labels[0]["label_id"], "--json"))
    assert {one["stage"] for one in made["learnt"]} == {"reward", "ppo"}
    assert {"mixture", "winrate"} <= {one["stage"] for one in made["derived"]}
    (laid,) = installation.root.glob("cpu-1/labels/*/frozen-*.jsonl")
    assert len(laid.read_text().splitlines()) == NUM_PAIRS
    shown = cli(
        installation, "labels", "withdraw", "demo", "--rater", "Ann", "--why", "a test", "--by", "Ben"
    )
    assert shown.startswith("20 labels of round 1 of demo are withdrawn. Built on them:")
    assert made["comparisons"]["key"][:12] in shown
