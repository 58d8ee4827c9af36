"""Test which earlier policy a run is compared with."""

import json
import shutil
from pathlib import Path

import pytest

from tasks.artifacts.artifact import Artifact, stage_artifact
from tasks.artifacts.store import home
from tasks.config.pipeline import Pipeline
from tasks.config.sections.gates import Promotion
from tasks.promotion import opponents, promotion
from tasks.promotion.finished_runs import find_run
from tasks.promotion.opponents import find_opponents, read_pin, write_pin
from tasks.stages.answers import answers
from tasks.system.errors import InputError
from tasks.tracking import registry
from tasks.tracking.client import Tracker
from tests.tasks.promotion.finished_runs import GOOD, MadeRun, make_run


def promote(tracker: Tracker, made: MadeRun) -> str:
    settings = Promotion.model_validate({"gates": {"win_rate_vs_champion": None}})
    proposal = promotion.propose(tracker, settings, find_run(tracker, made.run_id))
    promotion.challenge(tracker, proposal)
    return promotion.promote(tracker, proposal, by="anna").outcome


def artifact(made: MadeRun, stage: str) -> Artifact:
    return stage_artifact(made.manifests[stage], {}, cached=True, seconds=0)


def keys(found: dict[str, Artifact]) -> dict[str, str]:
    return {name: one["key"] for name, one in found.items()}


def test_without_a_champion_there_is_no_opponent(tracker: Tracker) -> None:
    assert find_opponents(tracker, Promotion(), "demo") == {}
    make_run(tracker, 1)
    assert find_opponents(tracker, Promotion(), "demo") == {}


def test_a_home_without_a_database_gets_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    tracker = Tracker(tmp_path, f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert find_opponents(tracker, Promotion(), "demo") == {}
    assert not (tmp_path / "mlflow.db").exists()


def test_opponents_are_the_champion_and_the_one_before(tracker: Tracker) -> None:
    first, second = (make_run(tracker, seed) for seed in (1, 2))
    assert promote(tracker, first) == "Promoted"
    found = find_opponents(tracker, Promotion(), "demo")
    assert keys(found) == {
        "champion": first.manifests["ppo"]["key"], "champion_model": first.manifests["merge"]["key"],
    }  # fmt: skip
    assert promote(tracker, second) == "Promoted"
    found = find_opponents(tracker, Promotion(), "demo")
    assert keys(found) == {
        "champion": second.manifests["ppo"]["key"], "champion_model": second.manifests["merge"]["key"],
        "previous": first.manifests["ppo"]["key"], "previous_model": first.manifests["merge"]["key"],
    }  # fmt: skip
    off = Promotion.model_validate({"gates": {"win_rate_vs_champion": None}})
    assert find_opponents(tracker, off, "demo") == {}
    registry.roll_back(tracker, "rlhf-policy-demo", "", by="anna")
    assert find_opponents(tracker, Promotion(), "demo")["champion"]["key"] == first.manifests["ppo"]["key"]


def test_pinned_opponents_are_the_same_after_a_promotion(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = (make_run(tracker, seed) for seed in (1, 2))
    promote(tracker, first)
    found = find_opponents(tracker, Promotion(), "demo")
    pin = write_pin(found)
    promote(tracker, second)
    assert read_pin(tracker, pin) == found
    assert read_pin(tracker, write_pin({})) == {}
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "another"))  # a machine that does not have its files
    monkeypatch.setattr(opponents, "find_manifest", lambda *_: None)
    with pytest.raises(InputError, match=f"the champion {first.manifests['ppo']['key'][:12]}, whose files"):
        read_pin(tracker, pin)


def test_a_champion_whose_files_are_gone_is_warned_of(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_run(tracker, 1)
    promote(tracker, made)
    said: list[str] = []
    monkeypatch.setattr(opponents.events, "tell", lambda name, **facts: said.append(facts["text"]))
    monkeypatch.setattr("tasks.tracking.remote_artifacts.find_published", lambda *_: None)
    assert keys(find_opponents(tracker, Promotion(), "demo"))  # this machine has them
    shutil.rmtree(home() / "objects" / "merge")
    assert find_opponents(tracker, Promotion(), "demo") == {}
    assert said == ["Version 1 of rlhf-policy-demo is compared with nothing: its files are gone"]


def test_a_run_is_compared_with_the_champion_or_if_that_is_its_own_policy_with_the_one_before(
    tracker: Tracker,
) -> None:
    made = [make_run(tracker, seed) for seed in (1, 2, 3)]
    for one in made[:2]:
        promote(tracker, one)
    found = found_jobs(find_opponents(tracker, Promotion(), "demo"))

    def compared(run: MadeRun) -> str:
        taken = {name: artifact(run, name) for name in ("data", "ppo")}
        taken |= {"base": artifact(run, "pretrain"), "model": artifact(run, "merge")}
        for table in ("data", "base", "model"):
            taken[table]["files"] = {}  # those of the fake run have other names
        step = answers.step(Pipeline(), **taken, **found)
        assert ("champion" in step.inputs) == ("champion_model" in step.inputs)
        return step.inputs["champion"]["key"]

    assert compared(made[2]) == made[1].manifests["ppo"]["key"], "the champion"
    assert compared(made[1]) == made[0].manifests["ppo"]["key"], "it is the champion: the one before"
    assert compared(made[0]) == made[1].manifests["ppo"]["key"]


def found_jobs(found: dict[str, Artifact]) -> dict[str, Artifact]:
    """Give fake runs the settings of a real one, and merged models no files, as theirs have other names."""
    for name, one in found.items():
        one["job"] = json.loads(Pipeline().model_dump_json())
        if name.endswith("_model"):
            one["files"] = {}
    return found


def test_a_run_that_was_compared_with_another_model_is_not_promoted(tracker: Tracker) -> None:
    first, second = (make_run(tracker, seed, GOOD) for seed in (1, 2))
    promote(tracker, first)
    proposal = promotion.propose(tracker, Promotion(), find_run(tracker, second.run_id))
    ending = promotion.challenge(tracker, proposal)
    assert ending.outcome == "Refused"
    assert "The run has not compared PPO with the champion (version 1): run it again" in ending.sentence


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(opponents.events, "tell", lambda name, **facts: said.append(facts["text"]))
    return said


@pytest.mark.parametrize("stage", ["ppo", "merge"])
def test_a_champion_whose_weights_are_gone_or_damaged_is_warned_of(
    tracker: Tracker, home: Path, warnings: list[str], stage: str
) -> None:
    made = make_run(tracker, 1)
    promote(tracker, made)
    key = made.manifests[stage]["key"]
    weights = [path for path in home.rglob("*.safetensors") if key in str(path)]
    assert len({path.relative_to(home).parts[0] for path in weights}) == 2  # the store and MLflow
    for path in weights:
        path.chmod(0o644)
        path.write_text("damaged")
    assert keys(find_opponents(tracker, Promotion(), "demo", fetch=False))  # `alignflow plan` fetches nothing
    for _ in range(2):
        assert find_opponents(tracker, Promotion(), "demo") == {}
    assert warnings == ["Version 1 of rlhf-policy-demo is compared with nothing: its files are gone"] * 2


def test_a_champion_that_cannot_be_read_leaves_the_tracker_on(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    promote(tracker, make_run(tracker, 1))
    registry.set_tags(tracker, "rlhf-policy-demo", "1", {registry.STAGE_KEYS: "not json"})
    assert find_opponents(tracker, Promotion(), "demo") == {}

    def fail(*_: object) -> None:
        raise RuntimeError("there is no registry\nat all")

    monkeypatch.setattr(registry, "list_versions", fail)
    assert find_opponents(tracker, Promotion(), "demo") == {}
    assert tracker.is_up
    first, second = warnings
    assert first.startswith(
        "The run is compared with no champion: rlhf-policy-demo cannot be read from MLflow"
    )
    assert second.endswith("(there is no registry)")


def test_the_champion_of_another_profile_is_no_opponent_without_a_word(
    tracker: Tracker, warnings: list[str]
) -> None:
    made = make_run(tracker, 1)
    promote(tracker, made)
    assert find_opponents(tracker, Promotion(), "travel") == {}
    assert warnings == []
    shared = Promotion(model="rlhf-policy-demo")
    assert find_opponents(tracker, shared, "travel")["champion"]["key"] == made.manifests["ppo"]["key"]
    assert warnings == ["The champion of rlhf-policy-demo, version 1, is of the profile demo"]
