"""Test what a rollback leaves behind, and what only a person may decide after it."""

import fcntl
from pathlib import Path

import pytest

from tasks.config.sections.gates import Promotion
from tasks.promotion import promotion
from tasks.promotion.assessment import assess
from tasks.promotion.finished_runs import find_run
from tasks.promotion.promotion import Proposal
from tasks.promotion.rollback import roll_back
from tasks.system.errors import InputError
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import MadeRun, make_run
from tests.tasks.promotion.test_assessment import with_report

MODEL = Promotion().model_name("demo")


def propose(tracker: Tracker, made: MadeRun, model: str = "") -> Proposal:
    return promotion.propose(tracker, Promotion(model=model), find_run(tracker, made.run_id))


def promote(tracker: Tracker, made: MadeRun, *, by_person: bool = False) -> promotion.Ending:
    proposal = propose(tracker, made)
    ending = promotion.challenge(tracker, proposal, by_person=by_person)
    return promotion.promote(tracker, proposal, by="anna") if ending.outcome == "Challenger" else ending


def champion(tracker: Tracker) -> registry.ModelVersion:
    found = registry.find_version(tracker, MODEL, registry.CHAMPION)
    assert found is not None
    return found


def test_what_was_rolled_back_is_promoted_again_by_a_person_alone(tracker: Tracker) -> None:
    first, second = make_run(tracker, 1), make_run(tracker, 2)
    promote(tracker, first)
    second = make_run(tracker, 3)
    promote(tracker, second)
    roll_back(tracker, MODEL, "", by="bob")
    run = find_run(tracker, second.run_id)
    found = assess(tracker, Promotion(), run.profile, run.summary["metrics"], run.stages)
    assert found is not None
    assert found.sentence == "The gate rolled_back refuses PPO."
    ending = promote(tracker, second)
    assert ending.outcome == "Refused"
    assert "rolled_back: Version 2 was rolled back by bob on 20" in ending.sentence
    assert "`alignflow promote RUN --yes`" in ending.sentence
    assert champion(tracker).version == "1"
    assert promote(tracker, second, by_person=True).outcome == "Promoted"
    assert champion(tracker).version == "2"
    assert not [tag for tag in champion(tracker).tags if tag.startswith("rolled_back.")]
    assert promote(tracker, first, by_person=True).outcome == "Refused"  # the gates that count are not waived


def test_a_version_that_a_rollback_restores_is_not_rolled_back_any_more(tracker: Tracker) -> None:
    for seed in (1, 2):
        promote(tracker, make_run(tracker, seed))
    for to in ("1", "2"):
        roll_back(tracker, MODEL, to, by="bob")
    assert not [tag for tag in champion(tracker).tags if tag.startswith("rolled_back.")]


def test_the_reports_say_who_is_champion_after_a_rollback(tracker: Tracker, home: Path) -> None:
    pages = []
    for seed in (1, 2):
        made = make_run(tracker, seed)
        pages.append(with_report(tracker, home, made, flow_run=f"flow-{seed}"))
        assert promote(tracker, made).outcome == "Promoted"
    left, restored = roll_back(tracker, MODEL, "", by="bob")
    assert (left.version, restored.version) == ("2", "1")
    first, second = (page.read_text() for page in pages)
    assert "<b>Promoted.</b> PPO of demo 1 (rlhf-policy-demo version 1) is the champion again" in first
    assert (
        "<b>Rolled back.</b> PPO of demo 2 (rlhf-policy-demo version 2) is no longer the champion" in second
    )
    for page, decided in ((first, "passed"), (second, "failed")):
        assert page.count('<p class="decision') == page.count(f'<p class="decision {decided}">') == 1
        assert "<summary>All gates</summary>" in page  # what they have said stays
    run = tracker.run(left.run_id)
    assert run is not None
    assert run.tags[promotion.OUTCOME].startswith("Rolled back: PPO of demo 2")


def test_a_rollback_of_a_run_that_was_deleted_still_happens(tracker: Tracker) -> None:
    made = [make_run(tracker, seed) for seed in (1,)]
    promote(tracker, made[0])
    made.append(make_run(tracker, 2))
    promote(tracker, made[1])
    tracker.call(lambda client: client.delete_run(made[1].run_id))
    roll_back(tracker, MODEL, "", by="bob")
    assert champion(tracker).version == "1"


def test_a_champion_that_has_changed_since_the_gates_were_asked_is_not_replaced(tracker: Tracker) -> None:
    promote(tracker, make_run(tracker, 1))
    second, third = (propose(tracker, make_run(tracker, seed)) for seed in (2, 3))
    for proposal in (second, third):
        assert promotion.challenge(tracker, proposal).outcome == "Challenger"
    promotion.promote(tracker, second, by="anna")
    with pytest.raises(InputError, match="has changed meanwhile, it is version 2: promote again"):
        promotion.promote(tracker, third, by="bob")
    assert champion(tracker).version == "2"


def test_each_profile_has_a_champion_of_its_own(tracker: Tracker) -> None:
    for seed, profile in enumerate(("demo", "travel", "a/b"), start=1):
        made = make_run(tracker, seed, profile=profile)
        assert promote(tracker, made).sentence.endswith("is the champion, the first one, decided by anna.")
    names = {one.name for one in registry.list_versions(tracker)}
    assert names == {"rlhf-policy-demo", "rlhf-policy-travel", "rlhf-policy-a-b"}
    with pytest.raises(InputError, match="Several models have a champion, so name the model: rlhf-"):
        registry.find_model(tracker, registry.CHAMPION)


def test_the_champion_of_another_profile_is_replaced_by_a_person_alone(tracker: Tracker) -> None:
    settings = {"promotion": {"model": "shared"}}
    proposals = []
    for seed, profile in enumerate(("demo", "travel"), start=1):
        proposal = propose(tracker, make_run(tracker, seed, profile=profile, settings=settings), "shared")
        proposals.append(proposal)
        if profile == "demo":
            promotion.promote(tracker, proposal, by="anna")
    ending = promotion.challenge(tracker, proposals[1])
    assert ending.outcome == "Refused"
    assert "champion_profile: The champion (version 1) is of the profile demo and not of travel" in (
        ending.sentence
    )
    ending = promotion.challenge(tracker, proposals[1], by_person=True)
    assert ending.outcome == "Challenger"
    assert ending.sentence.endswith("passes all gates but champion_profile.")


def test_a_rollback_passes_by_what_was_rolled_back_before(tracker: Tracker) -> None:
    for seed in (1, 2, 3):
        assert promote(tracker, make_run(tracker, seed)).outcome == "Promoted"
    for to in ("", "", "3", ""):  # from 3 to 2, to 1, back to 3, which was not so bad, and away from it again
        roll_back(tracker, MODEL, to, by="bob")
    assert champion(tracker).version == "1"
    second = registry.find_version(tracker, MODEL, "2")
    assert second is not None
    assert registry.ROLLED_BACK_AT in second.tags
    assert registry.ROLLED_BACK_AT not in champion(tracker).tags, "the way back to 3 was no verdict on it"


def test_the_champion_that_is_rolled_back_to_an_older_one_is_marked_again(tracker: Tracker) -> None:
    for seed in (1, 2):
        promote(tracker, make_run(tracker, seed))
    roll_back(tracker, MODEL, "", by="bob")
    promote(tracker, make_run(tracker, 3))
    roll_back(tracker, MODEL, "2", by="bob")
    third = registry.find_version(tracker, MODEL, "3")
    assert third is not None
    assert third.tags[registry.ROLLED_BACK_TO] == "2"


def test_no_other_process_promotes_during_a_rollback(
    tracker: Tracker, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        promote(tracker, make_run(tracker, seed))
    inside: list[bool] = []
    honest = registry.set_alias

    def watched(*args: object) -> None:
        with (home / "locks" / "registry.lock").open("a") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        inside.append(True)
        honest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "set_alias", watched)
    roll_back(tracker, MODEL, "", by="bob")
    assert inside == [True]


def test_the_same_weights_under_another_key_are_the_champion(tracker: Tracker) -> None:
    made = make_run(tracker, 1)
    promote(tracker, made)
    run = find_run(tracker, made.run_id)
    stages = {name: dict(stage) for name, stage in run.stages.items()}
    stages["ppo"]["key"] = "f" * 64
    found = assess(tracker, Promotion(), run.profile, run.summary["metrics"], stages)
    assert found is not None
    assert found.sentence == "PPO is the champion already (version 1)."


def test_a_gate_that_a_person_overrules_is_shown_as_overruled(tracker: Tracker, home: Path) -> None:
    promote(tracker, make_run(tracker, 1))
    second = make_run(tracker, 2)
    page = with_report(tracker, home, second, flow_run="flow-2")
    promote(tracker, second)
    roll_back(tracker, MODEL, "", by="bob")
    assert promote(tracker, second, by_person=True).outcome == "Promoted"
    text = page.read_text()
    assert '<p class="decision passed"><b>Promoted.</b>' in text
    assert "<b>rolled_back</b> overruled by a person: Version 2 was rolled back by bob" in text


def test_a_rollback_with_nothing_to_go_back_to_says_why(tracker: Tracker) -> None:
    for seed in (1, 2):
        promote(tracker, make_run(tracker, seed))
    roll_back(tracker, MODEL, "", by="bob")
    with pytest.raises(InputError, match="Version 1 of rlhf-policy-demo is its first champion: --to names"):
        roll_back(tracker, MODEL, "", by="bob")
    second = registry.find_version(tracker, MODEL, "2")
    assert second is not None
    promote(tracker, make_run(tracker, 3))
    roll_back(
        tracker, MODEL, "2", by="bob"
    )  # a person's choice; the way back is not to 1, which it came after
    registry.set_tags(tracker, MODEL, "1", {registry.ROLLED_BACK_AT: "2026-11-29T10:00:00Z"})
    with pytest.raises(
        InputError, match="Version 2 of rlhf-policy-demo has only champions before it that were"
    ):
        roll_back(tracker, MODEL, "", by="bob")
