"""`alignflow gc`: remove what no registered model, recent run or work in progress needs.

Only the home is cleaned; `mlflow gc` cleans what MLflow keeps.
"""

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from flows.arguments import number
from flows.commands.gc_candidates import (
    TRASH,
    Candidate,
    list_candidates,
    list_digest_notes,
    list_tables,
    measure,
)
from flows.commands.gc_roots import (
    RUN_LOCK,
    find_reachable,
    held_locks,
    labelled_keys,
    list_runs,
    named_inputs,
    tracked_keys,
)
from flows.display.terminal import console
from flows.services import environment
from tasks.artifacts.inventory import list_artifacts
from tasks.artifacts.store import Store, home
from tasks.system.errors import InputError
from tasks.system.locks import try_acquire

HELP = "Free what no registered model and no recent run needs."
EXAMPLE = "alignflow gc --dry-run"

KEEP_RUNS, DAYS = 10, 7.0
DAY, MB = 86400.0, 2**20
RESTING = 3600.0  # seconds; what changed since then may belong to a run that has just begun
SLOWLY = (
    "partial",
    "exports",
    "tokens",
    "hub",
    "quarantine",
    "locks",
)  # kinds that a user may come back to: removed after some days


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow gc`."""
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument(
        "--keep-runs",
        metavar="N",
        type=number(int, 0),
        default=KEEP_RUNS,
        help="keep what the last N runs need (default: %(default)s)",
    )
    parser.add_argument(
        "--days",
        metavar="D",
        type=number(float, 0),
        default=DAYS,
        help="and all that is younger than D days (default: %(default)s)",
    )


def main(args: argparse.Namespace) -> None:
    """Clean the home. Raises InputError."""
    environment.use_running_servers(home())
    environment.prepare_for_reading()
    clean(home(), keep_runs=args.keep_runs, days=args.days, dry_run=args.dry_run)


class Survey(NamedTuple):
    """What is removed, and which artifacts are kept."""

    removed: list[Candidate]
    kept: list[Candidate]


def clean(
    root: Path,
    *,
    keep_runs: int = KEEP_RUNS,
    days: float = DAYS,
    dry_run: bool = False,
    now: float | None = None,
) -> None:
    """Remove from the home what nothing needs; with ``dry_run`` only print it. Raises InputError."""
    if keep_runs < 0 or not days >= 0:
        raise InputError("--keep-runs and --days must be 0 or more")
    if not root.is_dir():
        console().print("Nothing to free.")
        return
    now = time.time() if now is None else now
    with _lock_home(root, dry_run):
        found = survey(root, keep_runs=keep_runs, days=days, now=now)
        refused = {} if dry_run else remove(root, found.removed)
    _print_survey(found, refused, dry_run=dry_run, now=now)


@contextmanager
def _lock_home(root: Path, dry_run: bool) -> Iterator[None]:
    """Refuse a second `alignflow gc` of the same home; a dry run takes no lock. Raises InputError."""
    if dry_run:
        yield
        return
    lock = try_acquire(root / "locks" / "gc.lock")
    if lock is None:
        raise InputError(f"Another `alignflow gc` is at work in {root}; wait for its end")
    with lock:
        yield


def survey(root: Path, *, keep_runs: int, days: float, now: float) -> Survey:
    """Return what can be removed, and which artifacts are kept. Raises InputError without the tracker."""
    _check_tracker(root)
    oldest, resting = now - days * DAY, now - RESTING
    found = list_artifacts(root)
    # listed first, because it takes longest: what changes meanwhile is seen by the steps below
    candidates = list_candidates(root, found)
    in_use = held_locks(root)
    needed = {root / "partial" / key for key in in_use}

    def is_removed(candidate: Candidate) -> bool:
        limit = min(oldest, resting) if candidate.kind in SLOWLY else resting
        return candidate.path not in needed and candidate.touched < limit

    recent = [run for place, run in enumerate(list_runs(root)) if place < keep_runs or run.finished > oldest]
    roots = in_use | {one.key or one.path.name for one in candidates if one.touched >= resting}
    roots |= {key for run in recent for key in run.keys} | labelled_keys(root)
    unfinished = [one for one in candidates if one.kind == "partial" and not is_removed(one)]
    roots |= {key for one in unfinished for key in named_inputs(one.path)}
    alive = {name.removeprefix(RUN_LOCK) for name in in_use if name.startswith(RUN_LOCK)}
    roots |= tracked_keys(root, since=oldest, alive=alive)
    needed |= find_reachable(found + list_tables(root, candidates), roots) | {run.path for run in recent}
    removed = {one.path: one for one in candidates if is_removed(one)}
    outermost = [one for path, one in removed.items() if not removed.keys() & {*path.parents}]
    kept = [one for one in candidates if one.kind in ("artifacts", "fetched") and not is_removed(one)]
    return Survey(outermost + list_digest_notes(root, {*removed}), kept)


def _check_tracker(root: Path) -> None:
    """Refuse if a server that is not named here knows the registered models. Raises InputError."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    login = root / "mlflow-auth.ini"  # `alignflow up` writes its database's address into it
    if os.environ.get("ALIGNFLOW_DATABASE") or (login.exists() and "= postgresql" in login.read_text()):
        raise InputError(
            "The database that knows this home's registered models is served by `alignflow up`: start it "
            "first"
        )
    if (root / "fetched").exists() and not (root / "mlflow.db").exists():
        raise InputError(
            "This home has worked with an MLflow server, which knows the registered models: set "
            "MLFLOW_TRACKING_URI"
        )


def remove(root: Path, candidates: list[Candidate]) -> dict[Path, str]:
    """Remove the candidates; return the reason for each that was left after all."""
    refused = {}
    for candidate in candidates:
        try:
            _remove(root, candidate)
        except _InUse as reason:
            refused[candidate.path] = str(reason)
        except OSError as error:
            refused[candidate.path] = error.strerror or str(error)
    with suppress(OSError):
        (root / TRASH).rmdir()
    return refused


class _InUse(Exception):
    """A process has used the candidate since the survey."""


def _remove(root: Path, candidate: Candidate) -> None:
    if candidate.kind == "locks":
        _remove_run_lock(candidate.path)
    elif candidate.path.is_file():
        candidate.path.unlink(missing_ok=True)
    elif candidate.key:
        with Store(root).lock(candidate.key, on_wait=_refuse):
            trash = _move_to_trash(root, candidate)
        shutil.rmtree(trash)
    else:
        shutil.rmtree(_move_to_trash(root, candidate))


def _refuse() -> None:
    raise _InUse("in use")


def _move_to_trash(root: Path, candidate: Candidate) -> Path:
    """Rename a folder before it is deleted, so that no process finds or resumes from half of it."""
    if measure(candidate.path)[1] > candidate.touched:
        raise _InUse("changed meanwhile")
    if candidate.path.parent.name == TRASH:
        return candidate.path
    (root / TRASH).mkdir(exist_ok=True)
    trash = root / TRASH / f"{candidate.kind}-{time.time_ns()}"
    os.rename(candidate.path, trash)
    return trash


def _remove_run_lock(path: Path) -> None:
    """Remove the lock file of a run that has ended."""
    lock = try_acquire(path)
    if lock is None:
        _refuse()
    else:
        with lock:
            path.unlink()


def _print_survey(found: Survey, refused: dict[Path, str], *, dry_run: bool, now: float) -> None:
    """Print what was or would be removed: by kind, and with ``dry_run`` also one by one."""
    screen = console()
    if dry_run and found.removed:
        screen.print(_list_table(found.removed, now))
        screen.print()
    removed = [candidate for candidate in found.removed if candidate.path not in refused]
    if removed:
        screen.print(_kind_table("Would free" if dry_run else "Freed", removed))
    else:
        screen.print("Nothing to free.")
    for candidate in found.removed:
        if candidate.path in refused:
            name = f"{candidate.kind}: {candidate.stage} {candidate.path.name[:12]}"
            screen.print(
                f"Left       {name} ({refused[candidate.path]})",
                markup=False,
                soft_wrap=True,
            )
    if found.kept:
        size = sum(candidate.size for candidate in found.kept) / MB
        screen.print(
            f"{len(found.kept)} artifacts stay, {size:.1f} MB: recent runs, registered models or work in "
            "progress need them.",
            markup=False,
        )


def _kind_table(title: str, candidates: list[Candidate]) -> Table:
    """Return a table with the number and size of the candidates of each kind."""
    table = _make_table(title, "number", "MB")
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        of_kind = [candidate for candidate in candidates if candidate.kind == kind]
        table.add_row(kind, *_totals(of_kind))
    table.add_row("all", *_totals(candidates))
    return table


def _totals(candidates: list[Candidate]) -> tuple[str, str]:
    """Return the number and the size of the candidates as text."""
    return str(len(candidates)), f"{sum(candidate.size for candidate in candidates) / MB:.1f}"


def _list_table(candidates: list[Candidate], now: float) -> Table:
    """Return a table with a row for each candidate."""
    table = _make_table("", "stage", "key", "MB", "age", right=("MB", "age"))
    for candidate in candidates:
        size, age = f"{candidate.size / MB:.1f}", _format_age(now - candidate.touched)
        table.add_row(candidate.kind, candidate.stage, candidate.path.name[:12], size, age)
    return table


def _make_table(*columns: str, right: tuple[str, ...] = ("number", "MB")) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _format_age(seconds: float) -> str:
    return f"{seconds / DAY:.0f} days" if seconds >= 2 * DAY else f"{seconds / 3600:.0f} h"
