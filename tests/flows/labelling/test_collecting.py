"""Test for which labels a round waits, and on which ones it is built."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from prefect.exceptions import Pause

from flows.labelling import collecting
from flows.labelling.collecting import collect_labels, find_labels
from flows.labelling.labels_needed import LabelsNeeded
from flows.labelling.server import open_queue
from tasks.artifacts.artifact import Artifact, stage_artifact, unbuilt_artifact, user_artifact
from tasks.artifacts.store import Store
from tasks.config.pipeline import Pipeline
from tasks.rounds.frozen_labels import thaw
from tasks.rounds.label_log import append_rows, label_folder, new_label
from tasks.rounds.label_round import LabelRound, find_round
from tasks.system.errors import InputError
from tasks.tracking import databases, runs
from tasks.tracking.client import Tracker, process_tracker
from tasks.tracking.runs import WAITS
from tasks.tracking.tracked_run import TrackedRun
from tests.tasks.rounds.made_rounds import make_pairs, make_round

NUM_PAIRS = 4


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Tracker, LabelRound, Artifact]:
    """Return a round in a home of its own, with the artifact of its pairs."""
    databases.lay("mlflow", tmp_path / "mlflow.db")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", databases.address(tmp_path / "mlflow.db"))
    monkeypatch.setattr(collecting, "flow_run", SimpleNamespace(id="flow-1"))
    deploy(monkeypatch, "")
    tracker = process_tracker()
    assert tracker.connect()
    one = make_round(tracker, make_pairs(NUM_PAIRS))
    manifest = Store(tmp_path).lookup("asked", one.key)
    assert manifest
    return tracker, one, stage_artifact(manifest, {}, cached=True, seconds=0.0)


def deploy(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(collecting, "deployment", SimpleNamespace(name=name))


def collect(made: tuple[Tracker, LabelRound, Artifact], **labels: Any) -> Artifact | None:
    tracker, one, asked = made
    config = Pipeline.model_validate({"rounds": {"labels": {"kind": "people", **labels}}})
    return collect_labels(config, "rounds", 1, asked, TrackedRun(tracker, one.run_ids[0]))


def label(one: LabelRound, *numbers: int, verdict: str = "tie") -> None:
    append_rows(label_folder(one.key), [new_label(f"{number:032x}", verdict, "Ann") for number in numbers])


def test_a_round_is_built_on_the_labels_that_were_there_when_it_went_on(made: Any) -> None:
    tracker, one, _ = made
    label(one, 0, 1, 2)
    with pytest.raises(LabelsNeeded, match="1 of 4 pairs of round 1 of rounds wait for labels") as caught:
        collect(made)
    assert WAITS in caught.value.__notes__
    label(one, 3, verdict="skip")
    assert len(open_queue(tracker, one).labels()) == NUM_PAIRS
    first = collect(made)
    assert first
    with pytest.raises(InputError, match="No pairs wait for labels: round 1 of rounds"):
        open_queue(tracker, find_round(tracker, one.key))
    label(one, 0, verdict="first")  # too late
    again = collect(made)
    assert again
    assert again["digest"] == first["digest"]
    thaw(tracker, one.key)
    rebuilt = collect(made)
    assert rebuilt
    assert rebuilt["digest"] != first["digest"]


def test_a_deployed_run_is_suspended_and_goes_on_with_enough_labels_when_it_is_resumed(
    made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(monkeypatch, "demo")
    asked_for: list[dict[str, Any]] = []

    def suspend(**options: Any) -> None:
        asked_for.append(options)
        if len(asked_for) == 1:
            raise Pause

    monkeypatch.setattr(collecting, "suspend_flow_run", suspend)
    label(made[1], 0)
    with pytest.raises(Pause) as caught:
        collect(made, least=2, timeout_hours=0.5)
    assert WAITS in caught.value.__notes__
    assert asked_for[0] == {"timeout": 1800, "key": f"labels {made[1].key[:12]}"}
    with pytest.raises(InputError, match=r"has labels of 1 pairs, and rounds\.labels\.least is 2"):
        collect(made, least=2)
    label(made[1], 1)
    assert collect(made, least=2)
    assert asked_for[1:] == [asked_for[1]] * 2  # the key of the same pairs


def test_a_plan_takes_the_labels_that_a_run_would_build_on_and_waits_for_none(
    made: Any, tmp_path: Path
) -> None:
    tracker, one, asked = made
    config = Pipeline.model_validate({"rounds": {"labels": {"kind": "people"}}})
    label(one, 0, 1, 2, 3)
    assert find_labels(config, tracker, asked) == unbuilt_artifact("labels")
    frozen = collect(made)
    assert frozen
    assert find_labels(config, tracker, asked) == frozen
    assert find_labels(config, tracker, unbuilt_artifact("asked")) == unbuilt_artifact("labels")
    assert find_labels(Pipeline(), tracker, asked) is None
    (tmp_path / "own.jsonl").write_text("{}\n")
    own = Pipeline.model_validate(
        {"rounds": {"labels": {"kind": "file", "path": str(tmp_path / "own.jsonl")}}}
    )
    assert find_labels(own, tracker, asked) == user_artifact(tmp_path / "own.jsonl")


@pytest.mark.parametrize("deployment", ["", "demo"])
def test_the_run_of_a_round_that_waits_is_scheduled_in_mlflow(
    made: Any, monkeypatch: pytest.MonkeyPatch, deployment: str
) -> None:
    def suspend(**options: Any) -> None:
        raise Pause

    tracker, _, asked = made
    deploy(monkeypatch, deployment)
    monkeypatch.setattr(collecting, "suspend_flow_run", suspend)
    config = Pipeline.model_validate({"rounds": {"labels": {"kind": "people"}}})
    with pytest.raises((LabelsNeeded, Pause)):
        with runs.pipeline_run(tracker, "rounds", {}, profile="rounds") as tracked:
            collect_labels(config, "rounds", 1, asked, tracked)
    assert MlflowClient().get_run(str(tracked.run_id)).info.status == "SCHEDULED"


def test_labels_without_mlflow_are_refused(made: Any) -> None:
    tracker, _, asked = made
    config = Pipeline.model_validate({"rounds": {"labels": {"kind": "people"}}})
    with pytest.raises(InputError, match="People's labels are kept in MLflow, which is not reachable"):
        collect_labels(config, "rounds", 1, asked, TrackedRun(tracker, None))
