"""What a pipeline does about each end of a stage on a worker; the workers themselves are in test_operations."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import State, StateType

from flows.stage import _different, as_step
from tasks.artifacts.artifact import Artifact, Step, code_of, within
from tasks.config.jobs import PpoJob
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import dispatch
from tasks.execution.dispatch import BAD_INPUT, INPUT_MISSING, MAX_LOST, OTHER_CODE
from tasks.system.errors import InputError, InputMissing, StageFailed
from tasks.tracking.client import Tracker

FILES = {"model/config.json": "c", "card.json": "b", "rl.parquet": "r"}
DATA = Artifact(
    stage="data",
    key="k",
    digest="d",
    path="",
    files=FILES,
    seconds=1.0,
    peak_mb=1.0,
    cached=True,
    metrics={"a": 1},
    warnings=["careful"],
)
STEP = Step("ppo", PpoJob.of(Pipeline(seed=3)), {"data": DATA, "model": within(DATA, "model")}, shown=("kl",))
COMPLETED = State(type=StateType.COMPLETED)
CRASHED = State(type=StateType.CRASHED, message="gone")


def failed(message: str) -> State:
    return State(type=StateType.FAILED, message=message)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let the runs of the stage end in these states, one after another; gives what is done meanwhile."""

    def prepare(*states: State, can_publish: bool = True) -> list[str]:
        done: list[str] = []
        waiting = list(states)

        def started(*_: Any) -> Any:
            done.append("start")
            return SimpleNamespace(id=uuid4(), name="ppo", parent_task_run_id=None)

        def publish(artifact: Artifact, tracker: Tracker, *, parent: str | None) -> bool:
            done.append(f"publish {artifact['path'] or artifact['stage']}")
            return can_publish

        monkeypatch.setattr(dispatch, "_joined", lambda _: None)
        monkeypatch.setattr(dispatch, "_started", started)
        monkeypatch.setattr(dispatch, "_end_of", lambda *_: waiting.pop(0))
        monkeypatch.setattr(dispatch, "find_published", lambda tracker, key: key)
        monkeypatch.setattr(dispatch, "publish", publish)
        return done

    return prepare


def run() -> Any:
    return dispatch.dispatch(STEP, "gpu", machine=Machine(), tracker=Tracker(Path("home"), ""), tracked=None)


def test_a_step_means_the_same_after_its_way_through_a_server() -> None:
    sent = json.loads(json.dumps(dispatch.parameters(STEP, Machine(), None), sort_keys=True))
    received = as_step(sent["stage"], sent["job"], sent["inputs"], sent["shown"])
    assert received.recipe == STEP.recipe
    assert received.shown == STEP.shown
    assert received.inputs["model"]["path"] == "model"


def test_a_worker_with_another_schema_of_artifacts_is_told_from_one_with_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent = dispatch.parameters(STEP, Machine(), None)["sources"]
    assert not _different(sent, code_of("ppo"))
    monkeypatch.setattr("tasks.artifacts.artifact.SCHEMA", 99)
    assert _different(sent, code_of("ppo")) == ["the schema of artifacts"]


def test_a_lost_machine_is_replaced_and_not_for_ever(ends: Callable[..., list[str]]) -> None:
    done = ends(CRASHED, CRASHED, COMPLETED)
    assert run() == STEP.recipe.key
    assert done == ["start"] * 3
    done = ends(*[CRASHED] * (MAX_LOST + 1))
    with pytest.raises(StageFailed, match="gone"):
        run()
    assert done == ["start"] * (MAX_LOST + 1)


@pytest.mark.parametrize(
    ("state", "error", "sentence"),
    [
        (failed("The stage ppo failed: CUDA went away."), StageFailed, "CUDA went away .on the pool gpu"),
        (failed(f"{BAD_INPUT}No questions here."), InputError, "^No questions here$"),
        (failed(f"{OTHER_CODE}This worker has other code"), StageFailed, "^This worker has other code[.]"),
        (State(type=StateType.CANCELLED, message="by hand"), StageFailed, "by hand"),
    ],
)
def test_what_is_the_stages_own_end_is_told_and_not_tried_again(
    ends: Callable[..., list[str]], state: State, error: type[Exception], sentence: str
) -> None:
    done = ends(state, COMPLETED)
    with pytest.raises(error, match=sentence):
        run()
    assert done == ["start"]


def test_what_a_worker_lacks_is_uploaded_once(ends: Callable[..., list[str]]) -> None:
    missing = failed(INPUT_MISSING + str(InputMissing(["data", "model"])))
    done = ends(missing, COMPLETED)
    assert run() == STEP.recipe.key
    assert done == ["start", "publish data", "publish model", "start"]
    ends(missing, missing)
    with pytest.raises(StageFailed, match="lacks inputs"):
        run()
    done = ends(missing, can_publish=False)
    with pytest.raises(StageFailed, match="data, model"):
        run()
    assert done == ["start", "publish data"]
