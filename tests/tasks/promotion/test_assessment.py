"""Test what the gates say of a run before anything is registered, and where the report says it."""

from pathlib import Path
from typing import Any

import pytest

from tasks.config.sections.gates import Promotion
from tasks.promotion import promotion
from tasks.promotion.assessment import Assessment, assess
from tasks.promotion.finished_runs import find_run
from tasks.promotion.gate_results import GateResult
from tasks.promotion.report_page import BEGIN, END, gates_as_html, replace_gates
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tests.support.pages.html_tags import Tags
from tests.support.reports import EVIL
from tests.tasks.promotion.finished_runs import GOOD, MadeRun, make_run

PAGE = f"<main><h1>PPO wins</h1>{BEGIN}before{END}<p>after</p></main>"


def assess_run(tracker: Tracker, made: MadeRun, **settings: Any) -> Assessment | None:
    run = find_run(tracker, made.run_id)
    return assess(tracker, Promotion(**settings), run.profile, run.summary["metrics"], run.stages)


@pytest.mark.parametrize(
    ("metrics", "settings", "sentence"),
    [
        ({}, {}, "PPO passes all 6 gates."),
        ({"ppo.kl": 30.0}, {}, "The gate kl refuses PPO."),
        ({"ppo.kl": 30.0}, {"gates": {"kl": None}}, "PPO passes all 5 gates."),
        (
            {"ppo.kl": 30.0, "reward.worst_attack": None, "judge.gold.agreement": None},
            {},
            "The gates kl, worst_attack and judge_agreement refuse PPO.",
        ),
    ],
)
def test_the_gates_speak_in_one_sentence_and_nothing_is_registered(
    tracker: Tracker, metrics: dict[str, Any], settings: dict[str, Any], sentence: str
) -> None:
    found = assess_run(tracker, make_run(tracker, 1, GOOD | metrics), **settings)
    assert found is not None
    assert found.sentence == sentence
    assert registry.list_versions(tracker) == []


def test_a_run_without_the_wanted_policy_is_not_assessed(tracker: Tracker) -> None:
    assert assess_run(tracker, make_run(tracker, 1), policy="dpo") is None


def decide(tracker: Tracker, made: MadeRun, **settings: Any) -> promotion.Ending:
    proposal = promotion.propose(tracker, Promotion(**settings), find_run(tracker, made.run_id))
    ending = promotion.challenge(tracker, proposal)
    return promotion.promote(tracker, proposal, by=EVIL) if ending.outcome == "Challenger" else ending


def with_report(tracker: Tracker, home: Path, made: MadeRun, *, flow_run: str) -> Path:
    """Put a report where a run leaves it; return its file in the home."""
    kept = home / "runs" / flow_run / "report.html"
    for place in (kept, home / "report.html"):
        place.write_text(PAGE)
    tracker.upload(made.run_id, kept, None)
    return kept


def test_a_decision_is_written_into_the_report_in_mlflow_and_here(
    tracker: Tracker, home: Path, tmp_path: Path
) -> None:
    made = make_run(tracker, 1)
    kept = with_report(tracker, home, made, flow_run="flow-1")
    assert decide(tracker, made).outcome == "Promoted"
    downloaded = tracker.download(made.run_id, "report.html", tmp_path)
    assert downloaded is not None
    pages = [path.read_text() for path in (downloaded, kept, home / "report.html")]
    assert len(set(pages)) == 1
    assert "Promoted." in pages[0]
    assert "before" not in pages[0]
    assert pages[0].startswith("<main><h1>PPO wins</h1>")
    assert pages[0].endswith("<p>after</p></main>")
    assert "script" not in {tag for tag, _ in Tags(pages[0]).opened}
    found = assess_run(tracker, made)
    assert found is not None
    assert found.sentence == "PPO is the champion already (version 1)."


def test_a_refusal_names_the_gate_and_leaves_a_later_runs_report(tracker: Tracker, home: Path) -> None:
    made = make_run(tracker, 1, GOOD | {"ppo.kl": 30.0})
    kept = with_report(tracker, home, made, flow_run="flow-1")
    (home / "report.html").write_text("another run's")
    assert decide(tracker, made).outcome == "Refused"
    page = kept.read_text()
    assert page.count("10.00 over the budget") == 1  # not again in the sentence above it
    assert "<b>Refused.</b> PPO of demo 1 (rlhf-policy-demo version 1) is not promoted." in page
    assert (home / "report.html").read_text() == "another run's"


def test_no_text_of_a_gate_becomes_markup() -> None:
    results = [GateResult(EVIL, passed, EVIL, EVIL, EVIL) for passed in (True, False, None)]
    text = gates_as_html(EVIL, EVIL, results, [EVIL])
    tags = Tags(text)
    assert tags.open == []
    assert not {tag for tag, _ in tags.opened} & {"script", "img", "pre"}
    assert text.count("<li>") == 2
    assert [text.count(f">{verdict}</td>") for verdict in ("passed", "failed", "cannot be decided")] == [
        1,
        1,
        1,
    ]
    page = replace_gates(PAGE, text)
    assert replace_gates(page, "") == PAGE.replace("before", "")
