"""Test promotion on real servers: gates refuse, a person decides in Prefect's page, versions come back."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import mlflow
import pytest
from prefect.client.schemas.objects import FlowRun, StateType

from tasks.artifacts.artifact import only, stage_artifact
from tasks.config.sections.gates import Promotion
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tasks.tracking.remote_artifacts import find_published, locate
from tests.support import fake_programs
from tests.support.fake_programs import wait_until
from tests.support.installation import Installation
from tests.support.pages.prefect_pages import PrefectPages, open_run
from tests.support.paths import ROOT
from tests.tasks.promotion.finished_runs import GOOD, MadeRun, interval, make_run

pytestmark = pytest.mark.slow

MODEL = Promotion().model_name("demo")


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Run both servers over SQLite, with all deployments, and a worker that takes one flow run at a time."""
    made = Installation(tmp_path_factory.mktemp("promotion"), ROOT, "", "")
    try:
        made.start_worker("cpu", "cpu-1", "--limit", "1")
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
def tracker(installation: Installation) -> Iterator[Tracker]:
    """Return MLflow's server as another machine sees it, on which the runs of these tests were made."""
    home = installation.root / "laptop"
    (home / "locks").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patched:
        for name in list(os.environ):
            if name.startswith(("PREFECT_", "MLFLOW_")):
                patched.delenv(name)
        patched.setenv("ALIGNFLOW_HOME", str(home))
        patched.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        for name, value in installation.login.items():
            if name.startswith("MLFLOW_"):
                patched.setenv(name, value)
        opened = Tracker(home, installation.mlflow)
        assert opened.connect()
        yield opened


def start(installation: Installation, made: MadeRun | None, **settings: Any) -> UUID:
    """Start a run of the deployment promote/demo."""
    parameters = {"promotion": Promotion.model_validate(settings).model_dump(mode="json")}
    return installation.trigger("promote/demo", run=made.run_id if made else "", **parameters)


def end(installation: Installation, run: UUID) -> tuple[str, str]:
    """Return the name and message of the state that a flow run ends in, which is a completed one."""
    state = installation.wait_for_run(run).state
    assert state is not None
    assert state.type == StateType.COMPLETED, state.message
    return str(state.name), str(state.message)


def champion(tracker: Tracker) -> str:
    found = registry.find_version(tracker, MODEL, registry.CHAMPION)
    return found.version if found else ""


def cli(installation: Installation, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line on the machine on which the runs were made."""
    home = installation.root / "laptop"
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=installation.root,
        env={**fake_programs.environment(ROOT, home), **installation.login},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.fixture(scope="module")
def first(installation: Installation, tracker: Tracker) -> MadeRun:
    """Promote a good first model, as the newest run of its profile."""
    made = make_run(tracker, 1)
    name, message = end(installation, start(installation, None))
    assert name == "Promoted"
    assert "version 1) is the champion, the first one, decided by the gates" in message
    return made


def test_a_champion_is_loaded_by_its_alias(
    installation: Installation,
    tracker: Tracker,
    first: MadeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = mlflow.artifacts.download_artifacts(
        f"models:/{MODEL}@champion", dst_path=str(tmp_path), tracking_uri=tracker.uri
    )
    policy = json.loads(Path(place, "model.json").read_text())["artifacts"]["policy"]
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "another"))
    (tmp_path / "another").mkdir()
    found = find_published(tracker, policy["key"])
    assert found is not None
    artifact = stage_artifact(found.manifest, {}, cached=True, seconds=0.0)
    adapter = locate(only(artifact, "adapter"), tracker) / "adapter" / "adapter_model.safetensors"
    assert adapter.read_text() == "ppo 1"


# a figure of each bad challenger, and a part of what the message says of it
BAD = {
    "worse than the champion": (
        {"gold_win_rate.ppo_vs_champion": interval(0.41, 0.37, 0.45)},
        "win_rate_vs_champion: PPO wins 41.0 % against the champion (version 1) by the gold scorer: worse, "
        "by 9.0 points.",
    ),
    "too much tax": (
        {"tax.arc.ppo_vs_sft": interval(3.0, 1.0, 5.0)},
        "alignment_tax.arc: PPO loses 3.0 points on arc against SFT, at most 5.0: 3.0 more than the gate "
        "allows.",
    ),
    "a fooled reward model": (
        {"reward.worst_attack": interval(0.457, 0.414, 0.5, 512)},
        "worst_attack: Worthless answers out-score 45.7 % of the real ones by the reward model: it is "
        "fooled, 20.7 points above the limit.",
    ),
    "a bad judge": (
        {"judge.gold.agreement": interval(0.55, 0.49, 0.61)},
        "judge_agreement: The gold scorer agrees with 55.0 % of held-out votes: not shown to be better than "
        '"the longer answer wins", as its interval begins 8.2 points too low.',
    ),
}


@pytest.mark.parametrize("flaw", BAD)
def test_a_bad_challenger_is_refused_with_its_figure(
    installation: Installation, tracker: Tracker, first: MadeRun, flaw: str
) -> None:
    figures, sentence = BAD[flaw]
    made = make_run(tracker, 10 + list(BAD).index(flaw), GOOD | figures)
    name, message = end(installation, start(installation, made, gates={"alignment_tax": 2.0}))
    assert name == "Refused"
    assert message.endswith(f"is not promoted. {sentence}")
    assert champion(tracker) == "1"
    refused, *_ = registry.list_versions(tracker, MODEL)
    assert (refused.tags[registry.DECISION], refused.aliases) == ("refused", ())


def test_a_second_champion_comes_and_goes_by_the_command_line(
    installation: Installation, tracker: Tracker, first: MadeRun
) -> None:
    made = make_run(tracker, 20)
    asked = cli(installation, "promote", made.run_id, "--set", "promotion.approval=person")
    assert (asked.returncode, champion(tracker)) == (0, "1"), asked.stderr
    assert f"A person decides: `alignflow promote {made.run_id} --yes`" in asked.stdout
    done = cli(installation, "promote", made.run_id)
    second = champion(tracker)
    assert (done.returncode, second != "1") == (0, True), done.stderr
    assert f"(rlhf-policy-demo version {second}) is the champion in place of version 1" in done.stdout
    back = cli(installation, "rollback")
    assert back.stdout == (
        f"The champion of rlhf-policy-demo is version 1 again (ppo of run {first.run_id}), in place of "
        f"version {second}, which stays registered.\n"
    )
    assert champion(tracker) == "1"
    table = cli(installation, "models").stdout
    assert [line.split()[:3] for line in table.splitlines() if "champion" in line] == [
        [MODEL, "1", "champion"]
    ]
    refused = cli(installation, "promote", make_run(tracker, 21, GOOD | {"ppo.kl": 30.0}).run_id)
    assert refused.returncode == 1
    assert refused.stderr.endswith(
        "kl: PPO is up to 30.00 nats per answer away from SFT: 10.00 over the budget.\n"
    )


# ------------------------------------------------------------------------------------------- a person


def suspended(installation: Installation, run: UUID) -> FlowRun:
    return wait_until(
        lambda: (found := installation.read_run(run)).state_name == "Suspended" and found, 60, every=0.2
    )


def answer(pages: PrefectPages, run: UUID, *, decision: str, name: str, note: str) -> None:
    """Answer the question of a flow run in its page."""
    open_run(pages, run)
    pages.page.get_by_role("button", name="Resume").click()
    dialog = pages.page.locator(".p-modal")
    dialog.get_by_text("worst_attack").first.wait_for()
    dialog.locator(".p-select-button__control").first.click()
    pages.page.keyboard.press("ArrowDown")  # opens the list if the click has only focused it
    pages.page.locator(".p-select-option", has_text=decision).click()
    texts = dialog.locator("input[type=text], textarea")
    pages.screenshot("form")
    for number, text in enumerate((name, note)):
        texts.nth(number).fill(text)
    pages.screenshot("answered")
    dialog.get_by_role("button", name="Submit").click()


def test_a_person_decides_in_the_page_while_no_worker_is_held(
    installation: Installation, tracker: Tracker, first: MadeRun, tmp_path: Path
) -> None:
    made = make_run(tracker, 30)
    pictures = Path(os.environ.get("ALIGNFLOW_PICTURES") or tmp_path)
    run = start(installation, None, approval="person")  # the newest run, of which another one comes meanwhile
    suspended(installation, run)
    waiting = registry.find_version(tracker, MODEL, registry.CHALLENGER)
    assert waiting is not None
    assert waiting.tags["run"] == made.run_id
    wait_until(lambda: not installation.flow_processes(run))
    newer = make_run(tracker, 31, GOOD | {"ppo.kl": 30.0})
    assert end(installation, start(installation, newer))[0] == "Refused"  # by the worker's only place
    with PrefectPages(installation, pictures) as pages:
        accepted = False
        for _ in range(4):  # Prefect's server answers 503 if its SQLite file is locked just then
            with pages.page.expect_response(lambda response: response.url.endswith("/resume")) as caught:
                answer(pages, run, decision="promote", name="Anna", note="I have read twenty answers")
            accepted = caught.value.ok
            if accepted:
                break
            assert caught.value.status == 503
        assert accepted
    name, message = end(installation, run)
    assert name == "Promoted"
    assert message.endswith("decided by Anna (I have read twenty answers).")
    version = registry.find_version(tracker, MODEL, registry.CHAMPION)
    assert version is not None
    assert version.tags["run"] == made.run_id
    assert version.tags["decision.by"] == "Anna"
    assert version.tags["decision.note"] == "I have read twenty answers"
    assert registry.find_version(tracker, MODEL, registry.CHALLENGER) is None


def test_a_persons_no_leaves_the_champion(
    installation: Installation, tracker: Tracker, first: MadeRun
) -> None:
    before = champion(tracker)
    run = start(installation, make_run(tracker, 40), approval="person")
    suspended(installation, run)
    with installation.client() as client:
        client.resume_flow_run(run, run_input={"decision": "reject", "name": "Bob", "note": "Not yet"})
    name, message = end(installation, run)
    assert name == "Rejected"
    assert message.endswith("passes all gates and was rejected by Bob: Not yet.")
    assert champion(tracker) == before


def test_a_question_without_an_answer_ends_after_its_time(
    installation: Installation, tracker: Tracker, first: MadeRun
) -> None:
    before = champion(tracker)
    run = start(installation, make_run(tracker, 50), approval="person", timeout_hours=1 / 3600)
    found = installation.wait_for_run(run).state
    assert found is not None
    assert (found.type, found.message) == (StateType.FAILED, "The flow was paused and never resumed.")
    assert champion(tracker) == before
    assert registry.find_version(tracker, MODEL, registry.CHALLENGER) is not None
