"""Test that every state's name is one of those that Prefect's pages list and filter by; others are never
shown.
"""

import ast
import importlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import prefect
import pytest
from prefect.client.schemas.objects import State, StateType

from flows import retrain, stage
from tasks.config.machine import Machine
from tasks.config.pipeline import Pipeline
from tasks.execution import dispatch
from tasks.execution.dispatch import BAD_INPUT, DISK_FAILURE, INPUT_MISSING, OTHER_CODE
from tasks.stages.stage import as_state
from tasks.system.errors import DiskFailure, InputError, InputMissing, StageFailed
from tasks.tracking.client import Tracker
from tests.support.paths import ROOT

STATES = ("State", "Completed", "Failed", "Crashed", "Cancelled", "Scheduled", "Paused", "ChangeFlowRunState")


def listed() -> set[str]:
    """Return the names that the filter of Prefect's V1 pages knows, read from the pages themselves."""
    scripts = Path(prefect.__ui_static_path__, "assets").glob("*.js")
    lists = [
        found
        for script in scripts
        for found in re.findall(r"\[(`Scheduled`,`Late`[^\]]+)\]", script.read_text())
    ]
    return {name.strip("`") for found in lists for name in found.split(",")}


def chosen() -> Iterator[tuple[str, str]]:
    """Return every name that our code gives to a state, with its place."""
    for path in [*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")]:
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            if isinstance(call.func, ast.Name) and call.func.id in STATES:
                for argument in [keyword.value for keyword in call.keywords if keyword.arg == "name"]:
                    yield from ((f"{path.stem}:{argument.lineno}", name) for name in values(path, argument))


def values(path: Path, expression: ast.expr) -> Iterator[str]:
    """Return the strings that an expression can be: constants, also by name and in both branches."""
    tests = {
        inner for node in ast.walk(expression) if isinstance(node, ast.IfExp) for inner in ast.walk(node.test)
    }
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for node in set(ast.walk(expression)) - tests:
        if isinstance(node, ast.Constant):
            yield str(node.value)
        elif isinstance(node, ast.Name) and isinstance(value := getattr(module, node.id, None), str):
            yield value


def test_the_pages_list_the_names_that_we_know() -> None:
    assert listed() >= {"Completed", "Cached", "Failed", "Crashed", "AwaitingRetry", "Suspended"}


def test_every_state_has_a_name_that_the_pages_list() -> None:
    found = dict(chosen())
    assert {"Crashed", "AwaitingRetry", "Cached"} <= set(found.values())
    assert {place: name for place, name in found.items() if name not in listed()} == {}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (InputError("No questions here."), f"{BAD_INPUT}No questions here."),
        (DiskFailure("The disk is full."), f"{DISK_FAILURE}on {socket.gethostname()}: The disk is full."),
        (InputMissing(["data"]), f"{INPUT_MISSING}{InputMissing(['data'])}"),
        (StageFailed("CUDA went away"), "CUDA went away"),
    ],
)
def test_a_stage_that_fails_on_a_worker_is_listed_and_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    state = run_stage_flow(monkeypatch, fail, {})
    assert (state.type, state.name, state.message) == (StateType.FAILED, "Failed", message)
    raised = dispatch._failure(
        SimpleNamespace(stage="ppo"), "gpu", SimpleNamespace(name="ppo", id=uuid4()), state
    )
    assert type(raised) is (type(error) if isinstance(error, InputError) else StageFailed)


def test_a_worker_with_other_code_is_listed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    state = run_stage_flow(monkeypatch, lambda *_: None, {"other.py": "1"})
    assert (state.type, state.name) == (StateType.FAILED, "Failed")
    assert state.message.startswith(f"{OTHER_CODE}This worker has other code")


def test_a_message_of_a_run_that_was_not_refused_is_not_read_as_a_reason() -> None:
    for state in (
        State(type=StateType.CRASHED, message=f"{BAD_INPUT}x"),
        State(type=StateType.FAILED),
        State(type=StateType.FAILED, message="x"),
    ):
        assert dispatch._reason(state) == ""


@pytest.mark.parametrize(("cached", "name"), [(True, "Cached"), (False, "Completed")])
def test_a_stage_that_ends_well_is_listed(monkeypatch: pytest.MonkeyPatch, cached: bool, name: str) -> None:
    artifact = {"cached": cached, "stage": "ppo", "key": "0" * 64}
    for state in (run_stage_flow(monkeypatch, lambda *_: artifact, {}), as_state(artifact)):
        assert (state.type, state.name) == (StateType.COMPLETED, name)
        assert name in listed()


def test_a_retraining_with_nothing_to_do_is_listed_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain, "check_inputs", lambda _: None)
    monkeypatch.setattr(Tracker, "connect", lambda _: True)
    monkeypatch.setattr(retrain, "plan", lambda *_, **__: [SimpleNamespace(action="reuse")])
    state = retrain.retrain.fn(Pipeline())
    assert (state.type, state.name, state.message) == (StateType.COMPLETED, "Cached", retrain.NO_CHANGE)
    assert state.name in listed()


def run_stage_flow(monkeypatch: pytest.MonkeyPatch, run: Any, sources: dict[str, str]) -> State:
    monkeypatch.setattr(stage, "code_of", lambda _: {})
    monkeypatch.setattr(stage, "as_step", lambda *_: None)
    monkeypatch.setattr(stage, "warm_up", lambda *_: None)
    monkeypatch.setattr(stage, "run_stage", run)
    monkeypatch.setattr("flows.display.run_log.get_run_logger", lambda: None)
    return stage.stage.fn("ppo", {}, {}, [], sources, Machine())
