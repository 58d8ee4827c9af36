"""Provide a tracker with a migrated database of its own."""

from pathlib import Path

import pytest

from tasks.tracking import databases
from tasks.tracking.client import Tracker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("home")
    databases.lay("mlflow", place / "mlflow.db")  # migrating an empty one takes seconds
    return place


@pytest.fixture(scope="module")
def tracker(home: Path) -> Tracker:
    """Return a tracker for all tests of a module."""
    return Tracker(home, databases.address(home / "mlflow.db"))


@pytest.fixture
def connected(home: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """Return the tracker, connected, in the process's environment."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", databases.address(home / "mlflow.db"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    assert tracker.connect()
    return tracker
