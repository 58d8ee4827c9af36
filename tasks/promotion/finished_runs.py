"""Find a finished run of the pipeline in MLflow, with its summary and settings."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from tasks.artifacts.store import Manifest, Store, home
from tasks.system.errors import InputError
from tasks.tracking import client, remote_artifacts
from tasks.tracking.client import Tracker
from tasks.tracking.runs import FLOW_RUN, MAX_ALL_RUNS, PROFILE

NAME = "mlflow.runName"  # tag
LATEST = "latest"
SUMMARY, SETTINGS, CARD = "summary.json", "config.json", "card.json"
UNREACHABLE = "MLflow, which holds the runs and the registered models, is not reachable"


class FinishedRun(NamedTuple):
    """A run of the pipeline that has a summary."""

    run_id: str  # in MLflow
    tags: dict[str, str]
    summary: dict[str, Any]
    settings: dict[str, Any]

    @property
    def profile(self) -> str:
        """Return the name of the profile that it is of."""
        return self.tags.get(PROFILE) or str(self.summary["profile"])

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Return what the summary says of each stage, by its name."""
        return {stage["name"]: stage for stage in self.summary["stages"]}


def connect(tracker: Tracker) -> None:
    """Connect to MLflow. Raises InputError if it cannot be reached."""
    if not tracker.connect():
        raise InputError(f"{UNREACHABLE}; `alignflow doctor` says more")


def find_run(tracker: Tracker, name: str = "", *, profile: str = "") -> FinishedRun:
    """Return the run with this id in MLflow or Prefect, or with this name.

    "" is the newest finished run, of ``profile`` if that is given. Raises InputError.
    """
    found = find_tracked(tracker, name, profile=profile)
    if found is None:
        raise InputError(_explain_missing(name, profile))
    return _read(tracker, found, name)


def find_tracked(tracker: Tracker, name: str = "", *, profile: str = "") -> client.Run | None:
    """Return what ``find_run`` finds as it stands in MLflow, with or without a summary. Raises InputError."""
    for text in (name, profile):
        if "'" in text or "`" in text:
            raise InputError(f"{text!r} is no run or profile: it has a quotation mark")
    return _find(tracker, name) if name else _newest(tracker, profile)


def find_unique_run(tracker: Tracker, name: str) -> FinishedRun:
    """Return the one run of the pipeline that has this id in MLflow or Prefect or this name, or whose id in
    MLflow begins so; "latest" is the newest finished run.

    Raises InputError if there is none, or several.
    """
    if name == LATEST:
        return find_run(tracker)
    pipelines = tracker.search(f"tags.`{PROFILE}` LIKE '%'", limit=MAX_ALL_RUNS)
    exact = [run for run in pipelines if name in (run.run_id, run.tags.get(FLOW_RUN), run.tags.get(NAME))]
    found = exact or [run for run in pipelines if name and run.run_id.startswith(name)]
    if not found:
        raise InputError(_explain_missing(name or "''", ""))
    if len(found) > 1:
        ids = ", ".join(run.run_id[:12] for run in found[:5]) + (", ..." if len(found) > 5 else "")
        raise InputError(
            f"{len(found)} runs are called {name} or have an id that begins so: give one of {ids}"
        )
    return _read(tracker, found[0], name)


def _read(tracker: Tracker, found: client.Run, name: str) -> FinishedRun:
    """Return a run with its summary and settings. Raises InputError if it has no summary."""
    with tempfile.TemporaryDirectory() as folder:
        files = [tracker.download(found.run_id, file, Path(folder)) for file in (SUMMARY, SETTINGS)]
        summary, settings = (json.loads(path.read_text()) if path else None for path in files)
    if summary is None:
        raise InputError(f"The run {name or found.run_id} has no {SUMMARY}: it has not come to its report")
    return FinishedRun(found.run_id, found.tags, summary, settings or {})


def _find(tracker: Tracker, name: str) -> client.Run | None:
    conditions = (
        f"attributes.run_id = '{name}'",
        f"tags.`{FLOW_RUN}` = '{name}'",
        f"attributes.run_name = '{name}'",
    )
    return next((found[0] for condition in conditions if (found := tracker.search(condition))), None)


def _newest(tracker: Tracker, profile: str) -> client.Run | None:
    of_profile = f"tags.`{PROFILE}` = '{profile}'" if profile else f"tags.`{PROFILE}` LIKE '%'"
    found = tracker.search(f"{of_profile} AND attributes.status = 'FINISHED'")
    return found[0] if found else None


def _explain_missing(name: str, profile: str) -> str:
    if not name:
        of_profile = f" of the profile {profile}" if profile else ""
        return f"There is no finished run{of_profile} in MLflow; `alignflow run` makes one"
    if (home() / "runs" / name / SUMMARY).is_file():
        return (
            f"The run {name} was not tracked in MLflow, so no model can be registered from it: run it again"
        )
    return f"There is no run {name} in MLflow: give its id there or in Prefect, or its name"


def find_manifest(tracker: Tracker, stage: str, key: str) -> Manifest | None:
    """Return the manifest of an artifact from this machine or MLflow; None if neither has it."""
    for tier in ("objects", "fetched"):
        path = home() / tier / stage / key / "manifest.json"
        try:
            manifest: Manifest = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if manifest.get("key") == key:
            return manifest
    found = remote_artifacts.find_published(tracker, key)
    return found.manifest if found else None


def read_licences(tracker: Tracker, key: str) -> str:
    """Return the licences of the texts in an artifact of the data stage, "" if they are not known."""
    path: Path | None = Store(home()).entry("data", key) / CARD
    with tempfile.TemporaryDirectory() as folder:
        if path is None or not path.is_file():
            found = remote_artifacts.find_published(tracker, key)
            path = tracker.download(found.run_id, f"{key}/{CARD}", Path(folder)) if found else None
        card = json.loads(path.read_text()) if path else {}
    return ", ".join(name or "no licence named" for name in sorted(card.get("licences", {})))
