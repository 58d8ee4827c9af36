"""What of a home is still reached: by its runs, by MLflow's registered models and recent runs, by work that goes on, and by what all these took."""

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from tasks.artifacts.inventory import Entry
from tasks.system.errors import InputError
from tasks.system.locks import is_held
from tasks.tracking import databases
from tasks.tracking.client import PATIENCE_TO_CONNECT, Tracker, process_tracker
from tasks.tracking.runs import KEY, PARENT

MOST = 50_000  # runs of one answer; MLflow takes no more
LIFE_LINE = "run-"  # how the lock of a pipeline at work begins; what follows is its run in MLflow
UNKNOWN = "MLflow, which knows the registered models, is not reachable, and nothing is freed before it is; `alignflow doctor` says more"


class Run(NamedTuple):
    """A run that came to its end in this home."""

    path: Path
    finished: float  # seconds since the epoch
    keys: frozenset[str]


def reached(found: list[Entry], roots: set[str]) -> set[Path]:
    """Where the artifacts lie that ``roots`` (keys or digests) name, and those that they were made from, and so on."""
    named: dict[str, list[Entry]] = defaultdict(list)
    for entry in found:
        for name in {entry.key, entry.digest} - {
            ""
        }:  # what the user brought has its content's digest as its key
            named[name].append(entry)
    kept: set[Path] = set()
    waiting = list(roots)
    while waiting:
        for entry in named[waiting.pop()]:
            if entry.path not in kept:
                kept.add(entry.path)
                waiting += entry.origins
    return kept


def runs(home: Path) -> list[Run]:
    """The runs of this home, newest first."""
    found = [_run(path) for path in (home / "runs").glob("*") if path.is_dir()]
    return sorted(found, key=lambda run: run.finished, reverse=True)


def _run(path: Path) -> Run:
    try:
        summary = json.loads((path / "summary.json").read_text())
        return Run(
            path, float(summary["finished"]), frozenset(str(stage["key"]) for stage in summary["stages"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return Run(path, path.stat().st_mtime, frozenset())


def at_work(home: Path) -> set[str]:
    """Names of the locks that are held now: keys of stages that are built, and LIFE_LINE and its run for every pipeline."""
    return {path.stem for path in (home / "locks").glob("*.lock") if is_held(path)}


def taken_by(partial_folder: Path) -> set[str]:
    """Keys of what a stage takes that is built, or was cut off, in this folder; other names may be among them."""
    try:
        places = json.loads((partial_folder / "job.json").read_text())["inputs"].values()
        return {part for place in places for part in Path(place).parts}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def tracked_keys(home: Path, *, since: float, alive: set[str]) -> set[str]:
    """Keys of registered models, of all stages that ran after ``since``, and of those of the pipelines ``alive`` (runs). Raises InputError.

    A home whose tracker is its own file has none before that file is there.
    """
    own = databases.address(home / "mlflow.db")
    if os.environ.get("MLFLOW_TRACKING_URI", own) == own and not (home / "mlflow.db").exists():
        return set()
    tracker = process_tracker()
    if not tracker.connect():
        raise InputError(UNKNOWN)
    conditions = [
        f"attributes.start_time > {int(since * 1000)}",
        *(f"tags.`{PARENT}` = '{run}'" for run in sorted(alive)),
    ]
    try:
        recent = [run for condition in conditions for run in tracker.search(condition, limit=MOST)]
        return ({run.tags.get(KEY, "") for run in recent} | _registered(tracker)) - {""}
    except Exception as error:
        raise InputError(
            f"{UNKNOWN} ({(str(error) or type(error).__name__).splitlines()[0][:200]})"
        ) from error


def _registered(tracker: Tracker) -> set[str]:
    """Return the keys of the artifacts of all registered models."""
    versions = tracker.model_versions(PATIENCE_TO_CONNECT)
    keys = {version.tags.get(KEY, "") for version in versions}
    for run_id in {version.run_id for version in versions} - {""}:
        run = tracker.run(run_id, PATIENCE_TO_CONNECT)  # None: it was deleted
        keys.add(run.tags.get(KEY, "") if run else "")
    return keys
