"""Find what of a home is still needed.

Roots are the runs of the home, MLflow's registered models and recent runs, and stages and pipelines at work.
Needed is what a root names, and what that was built from.
"""

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
from tasks.tracking.client import Run as TrackerRun
from tasks.tracking.registry import list_versions, stage_keys
from tasks.tracking.runs import MAX_ALL_RUNS, PARENT
from tasks.tracking.tracked_run import KEY

RUN_LOCK = "run-"  # prefix of the lock of a running pipeline; the rest is the id of its run in MLflow
UNKNOWN = (
    "MLflow, which knows the registered models, is not reachable, and nothing is freed before it is; "
    "`alignflow doctor` says more"
)


class Run(NamedTuple):
    """A finished run of this home."""

    path: Path
    finished: float  # seconds since the epoch
    keys: frozenset[str]


def find_reachable(found: list[Entry], roots: set[str]) -> set[Path]:
    """Return the artifacts that ``roots`` (keys or digests) name, and all that they were built from."""
    named: dict[str, list[Entry]] = defaultdict(list)
    for entry in found:
        for name in {entry.key, entry.digest} - {""}:
            named[name].append(entry)
    reached: set[Path] = set()
    pending = list(roots)
    while pending:
        for entry in named[pending.pop()]:
            if entry.path not in reached:
                reached.add(entry.path)
                pending += entry.origins
    return reached


def list_runs(home: Path) -> list[Run]:
    """Return the finished runs of this home, newest first."""
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


def labelled_keys(home: Path) -> set[str]:
    """Return the keys of the pairs that people label; no finished run names those of a waiting round."""
    return {path.name for path in (home / "labels").glob("*") if path.is_dir()}


def held_locks(home: Path) -> set[str]:
    """Return the names of the locks that are held now.

    They are the keys of the stages that are being built, and RUN_LOCK + run for every pipeline that runs.
    """
    return {path.stem for path in (home / "locks").glob("*.lock") if is_held(path)}


def named_inputs(partial_folder: Path) -> set[str]:
    """Return the names in the paths of a partial stage's inputs, among which are the keys of these inputs."""
    try:
        places = json.loads((partial_folder / "job.json").read_text())["inputs"].values()
        return {part for place in places for part in Path(place).parts}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def tracked_keys(home: Path, *, since: float, alive: set[str]) -> set[str]:
    """Return the keys of registered models, of stages that ran after ``since``, and of the runs ``alive``.

    A home that is tracked in its own database has none before that file exists. Raises InputError if MLflow
    cannot be asked.
    """
    own = databases.address(home / "mlflow.db")
    if os.environ.get("MLFLOW_TRACKING_URI", own) == own and not (home / "mlflow.db").exists():
        return set()
    tracker = process_tracker()
    if not tracker.connect():
        raise InputError(UNKNOWN)
    try:
        below = [run for one in sorted(alive) for run in _children(tracker, one)]
        # of the finished rounds of a run of rounds, whose next round takes their artifacts
        below += [run for one in below if KEY not in one.tags for run in _children(tracker, one.run_id)]
        recent = tracker.search(f"attributes.start_time > {int(since * 1000)}", limit=MAX_ALL_RUNS) + below
        return ({run.tags.get(KEY, "") for run in recent} | _registered(tracker)) - {""}
    except Exception as error:
        raise InputError(
            f"{UNKNOWN} ({(str(error) or type(error).__name__).splitlines()[0][:200]})"
        ) from error


def _children(tracker: Tracker, run: str) -> list[TrackerRun]:
    return tracker.search(f"tags.`{PARENT}` = '{run}'", limit=MAX_ALL_RUNS)


def _registered(tracker: Tracker) -> set[str]:
    """Return the keys of the artifacts of all registered models, and of the runs that they are of.

    A home may lack the policy and hold what it was trained on, so the policy's own key does not suffice.
    """
    versions = list_versions(tracker, patience=PATIENCE_TO_CONNECT, by_hand=True)
    keys = {key for version in versions for key in stage_keys(version)}
    for run_id in {version.run_id for version in versions} - {""}:
        run = tracker.run(run_id, PATIENCE_TO_CONNECT)  # None: it was deleted
        keys.add(run.tags.get(KEY, "") if run else "")
    return keys
