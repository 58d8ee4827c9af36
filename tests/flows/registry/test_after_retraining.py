"""Test what a retraining does when it has built something: it starts a promotion of its own."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.exceptions import ObjectNotFound

from flows import retrain
from flows.commands.plan import Planned
from flows.services import promotions
from tasks.config.pipeline import Pipeline
from tasks.promotion.finished_runs import FinishedRun

SUMMARY = {
    "file": "/home/runs/flow-7/summary.json",
    "headline": "PPO wins",
    "gates": "The gate kl refuses PPO.",
}
marks: list[tuple[str, str]] = []  # how far a promotion is, by run
REUSED = [Planned("ppo", "key of ppo", "reuse", [])]


@pytest.fixture
def retrained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Let a retraining build something, without Prefect; return the deployments that it starts."""
    started: list[tuple[str, dict[str, Any]]] = []
    marks.clear()

    def run_deployment(name: str, **options: Any) -> SimpleNamespace:
        started.append((name, options))
        return SimpleNamespace(name="promote demo")

    for name, value in {
        "get_run_logger": lambda: logging.getLogger("retrained"),
        "plan": lambda *_, **__: [SimpleNamespace(action="build")],
        "rlhf": lambda *_, **__: SUMMARY,
        "check_inputs": lambda _: None,
        "process_tracker": lambda: SimpleNamespace(
            connect=lambda: True, is_up=True, set_tags=lambda run, tags: marks.append((run, *tags.values()))
        ),
        "find_run": lambda _, run="", **__: FinishedRun(f"tracked {run}", {}, {"stages": []}, {}),
    }.items():
        monkeypatch.setattr(retrain, name, value)
    monkeypatch.setattr(promotions, "run_deployment", run_deployment)
    monkeypatch.setattr(promotions, "get_run_logger", lambda: logging.getLogger("promoted"))
    return started


def test_it_starts_a_promotion_of_its_run_and_does_not_wait(retrained: list[Any]) -> None:
    config = Pipeline.model_validate({"promotion": {"approval": "person"}})
    retrain.retrain.fn(config, profile="mine")
    ((name, options),) = retrained
    assert name == "promote/mine"
    assert options["parameters"] == {
        "promotion": config.promotion.model_dump(mode="json"), "profile": "mine", "run": "flow-7",
    }  # fmt: skip
    assert (options["timeout"], options["as_subflow"]) == (0, False)
    assert marks == [("tracked flow-7", "due"), ("tracked flow-7", "started")]


def test_it_starts_none_if_the_settings_say_so_or_nothing_was_built(
    retrained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    retrain.retrain.fn(Pipeline.model_validate({"promotion": {"after_retrain": False}}))
    monkeypatch.setattr(retrain, "plan", lambda *_, **__: REUSED)
    for mark in ("started", ""):  # by a retraining, or of a run that a person has made
        finished_run(monkeypatch, mark)
        assert retrain.retrain.fn(Pipeline()).name == "Cached"
    assert retrained == []


def finished_run(monkeypatch: pytest.MonkeyPatch, mark: str = "due", *, key: str = "key of ppo") -> None:
    """Let the newest run of any profile be one with this policy."""
    tags = {retrain.PROMOTION: mark} if mark else {}
    summary = {"stages": [{"name": "ppo", "key": key}]}
    found = FinishedRun("run-7", tags, summary, {})
    monkeypatch.setattr(retrain, "find_run", lambda *_, **__: found)


def test_a_promotion_that_was_never_started_is_started_when_nothing_is_built(
    retrained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrain, "plan", lambda *_, **__: REUSED)
    finished_run(monkeypatch, key="another")  # of other settings
    retrain.retrain.fn(Pipeline(), profile="mine")
    assert retrained == []
    finished_run(monkeypatch)
    retrain.retrain.fn(Pipeline.model_validate({"promotion": {"after_retrain": False}}), profile="mine")
    assert retrained == []
    assert retrain.retrain.fn(Pipeline(), profile="mine").name == "Cached"
    ((name, options),) = retrained
    assert (name, options["parameters"]["run"]) == ("promote/mine", "run-7")


@pytest.mark.parametrize("error", [RuntimeError("503 from Prefect"), ConnectionError()])
def test_a_promotion_that_cannot_be_started_is_no_failure(
    retrained: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(promotions, "run_deployment", fail)
    assert retrain.retrain.fn(Pipeline(), profile="mine").name == "Completed"
    assert f"promote/mine could not be started ({str(error) or 'ConnectionError'})" in caplog.text
    assert "`alignflow promote flow-7` does it by hand" in caplog.text
    assert "The next retraining tries again to promote flow-7" in caplog.text
    assert marks == [("tracked flow-7", "due")], "the next retraining tries again"


def test_mlflow_that_does_not_answer_is_no_failure(
    retrained: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(retrain, "plan", lambda *_, **__: REUSED)
    monkeypatch.setattr(retrain, "find_run", fail)
    assert retrain.retrain.fn(Pipeline()).name == "Cached"
    assert "The newest run could not be read (refused)" in caplog.text
    assert retrained == []


def test_a_promotion_that_is_not_deployed_is_no_failure(
    retrained: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ObjectNotFound(Exception())

    monkeypatch.setattr(promotions, "run_deployment", refuse)
    state = retrain.retrain.fn(Pipeline(), profile="mine")
    assert (state.name, state.message, state.data) == (
        "Completed",
        "PPO wins. The gate kl refuses PPO.",
        SUMMARY,
    )
    assert "no deployment promote/mine" in caplog.text
    assert marks == [("tracked flow-7", "due")]
    assert "`alignflow promote flow-7`" in caplog.text
