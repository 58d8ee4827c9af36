"""Give each test a home and MLflow's SQLite database of its own."""

from pathlib import Path

import pytest

from tasks.tracking import databases
from tasks.tracking.client import Tracker, process_tracker


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "home"
    place.mkdir()
    databases.lay("mlflow", place / "mlflow.db")
    for name, value in {
        "ALIGNFLOW_HOME": str(place),
        "MLFLOW_TRACKING_URI": databases.address(place / "mlflow.db"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        monkeypatch.setenv(name, value)
    return place


@pytest.fixture
def tracker(home: Path) -> Tracker:
    opened = process_tracker()
    assert opened.connect()
    return opened
