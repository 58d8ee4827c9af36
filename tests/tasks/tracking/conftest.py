"""Provide a tracker with a database of its own."""

from pathlib import Path

import pytest

from tasks.tracking.client import Tracker


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tracker(home: Path) -> Tracker:
    """Return a tracker for all tests of a module: creating its database takes seconds."""
    return Tracker(home, f"sqlite:///{home / 'mlflow.db'}")


@pytest.fixture
def connected(home: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """Return the tracker, connected, in the process's environment."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    assert tracker.connect()
    return tracker
