"""Test how the registry reads versions from an MLflow that other teams use too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks.tracking import databases, registry
from tasks.tracking.client import Tracker, process_tracker
from tasks.tracking.tracked_run import KEY


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """Connect to a registry of 6 versions of our model, and 5 of another team."""
    databases.lay("mlflow", tmp_path / "mlflow.db")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", databases.address(tmp_path / "mlflow.db"))
    opened = process_tracker()
    assert opened.connect()
    for name, count, tags in (("ours", 6, {KEY: "key"}), ("theirs", 5, {}), ("it's", 1, {KEY: "key"})):
        opened.call(lambda client, name=name: client.create_registered_model(name))
        for _ in range(count):
            opened.call(
                lambda client, name=name, tags=tags: client.create_model_version(name, "/tmp/x", tags=tags)
            )
        opened.call(lambda client, name=name: client.set_registered_model_alias(name, "champion", "1"))
    return opened


def test_a_model_is_read_in_two_calls_and_another_teams_models_not_at_all(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions: list[str] = []
    calls: list[object] = []
    search, call = registry._search, tracker.call

    def search_noted(client: Any, *, condition: str, token: str | None) -> Any:
        conditions.append(condition)
        return search(client, condition=condition, token=token)

    def call_noted(function: Callable[[Any], Any], patience: float | None = None) -> Any:
        calls.append(function)
        return call(function, patience)

    monkeypatch.setattr(registry, "_search", search_noted)
    monkeypatch.setattr(tracker, "call", call_noted)
    found = registry.find_version(tracker, "ours", registry.CHAMPION)
    assert found is not None
    assert (found.name, found.version, len(calls)) == ("ours", "1", 2)
    assert {one.name for one in registry.list_versions(tracker)} == {"ours", "it's"}
    assert len(registry.list_versions(tracker, "it's")) == 1
    assert registry.list_versions(tracker, "nothing") == []
    assert conditions[:2] == ["name='ours'", f"tags.`{KEY}` != ''"]
