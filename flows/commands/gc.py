"""`alignflow gc`: frees what no registered model, no recent run and no work going on reaches. What MLflow keeps stays; `mlflow gc` is for that."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from flows.commands.gc_roots import LIFE_LINE, at_work, reached, runs, taken_by, tracked_keys
from flows.display.terminal import console
from tasks.artifacts.inventory import Entry, entries
from tasks.artifacts.store import Store
from tasks.system.errors import InputError
from tasks.system.locks import is_held, try_acquire

KEEP_RUNS, DAYS = 10, 7.0
DAY, MB = 86400.0, 2**20
RESTING = 3600.0  # seconds; what was touched since may belong to a run that has only begun
SLOWLY = ("partial", "quarantine", "locks")  # kinds that somebody may come back to: they go after some days
TRASH = "trash"


class Candidate(NamedTuple):
    """One thing under the home that may go."""

    kind: str  # artifacts, fetched, partial, runs, quarantine, locks, leftovers or digests
    stage: str
    path: Path
    size: int
    touched: float  # seconds since the epoch
    key: str = ""  # of the lock that guards it


class Survey(NamedTuple):
    goes: list[Candidate]
    stays: list[Candidate]


def clean(
    home: Path,
    *,
    keep_runs: int = KEEP_RUNS,
    days: float = DAYS,
    dry_run: bool = False,
    now: float | None = None,
) -> None:
    """Free what nothing reaches, or with ``dry_run`` only say what it would be. Raises InputError."""
    if keep_runs < 0 or not days >= 0:
        raise InputError("--keep-runs and --days must be 0 or more")
    if not home.is_dir():
        console().print("Nothing to free.")
        return
    now = time.time() if now is None else now
    with _alone(home, dry_run):
        found = survey(home, keep_runs=keep_runs, days=days, now=now)
        refused = {} if dry_run else remove(home, found.goes)
    _show(found, refused, dry_run=dry_run, now=now)


@contextmanager
def _alone(home: Path, dry_run: bool) -> Iterator[None]:
    """One at a time; looking is always possible."""
    if dry_run:
        yield
        return
    lock = try_acquire(home / "locks" / "gc.lock")
    if lock is None:
        raise InputError(f"Another `alignflow gc` is at work in {home}; wait for its end")
    with lock:
        yield


def survey(home: Path, *, keep_runs: int, days: float, now: float) -> Survey:
    """What goes, and which artifacts stay."""
    _check_tracker(home)
    oldest, resting = now - days * DAY, now - RESTING
    found = entries(home)
    things = _things(home, found)  # takes the longest, so first: what happens meanwhile is seen below
    working = at_work(home)
    kept = {home / "partial" / key for key in working}

    def goes(thing: Candidate) -> bool:
        return thing.path not in kept and thing.touched < (
            min(oldest, resting) if thing.kind in SLOWLY else resting
        )

    recent = [run for place, run in enumerate(runs(home)) if place < keep_runs or run.finished > oldest]
    roots = working | {thing.key or thing.path.name for thing in things if thing.touched >= resting}
    roots |= {key for run in recent for key in run.keys}
    roots |= {
        key for thing in things if thing.kind == "partial" and not goes(thing) for key in taken_by(thing.path)
    }
    roots |= tracked_keys(
        home,
        since=oldest,
        alive={name.removeprefix(LIFE_LINE) for name in working if name.startswith(LIFE_LINE)},
    )
    kept |= reached(found, roots) | {run.path for run in recent}
    going = {thing.path: thing for thing in things if goes(thing)}
    whole = [thing for path, thing in going.items() if not going.keys() & {*path.parents}]
    stays = [thing for thing in things if thing.kind in ("artifacts", "fetched") and not goes(thing)]
    return Survey(whole + _notes(home, {*going}), stays)


def _check_tracker(home: Path) -> None:
    """Refuse where a server knows the registered models and nothing says where it is."""
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    login = home / "mlflow-auth.ini"  # what `alignflow up` writes names its database
    if os.environ.get("ALIGNFLOW_DATABASE") or (login.exists() and "= postgresql" in login.read_text()):
        raise InputError(
            "The database that knows this home's registered models is served by `alignflow up`: start it first"
        )
    if (home / "fetched").exists() and not (home / "mlflow.db").exists():
        raise InputError(
            "This home has worked with an MLflow server, which knows the registered models: set MLFLOW_TRACKING_URI"
        )


def _things(home: Path, found: list[Entry]) -> list[Candidate]:
    """All that could go, measured, but for the notes of digests."""
    things = [_artifact(entry) for entry in found]
    things += [
        _thing("partial", _stage_of(path), path, key=path.name)
        for path in sorted((home / "partial").glob("*"))
    ]
    things += [_thing("runs", "", path) for path in sorted((home / "runs").glob("*"))]
    things += [_set_aside(path) for path in sorted((home / "quarantine").glob("*"))]
    things += [
        _thing("locks", "", path)
        for path in sorted((home / "locks").glob(f"{LIFE_LINE}*.lock"))
        if not is_held(path)
    ]
    left = [
        *(home / "fetched").glob("*/*/.new-*"),
        *(home / TRASH).glob("*"),
        *home.glob(".*.new"),
        *(home / "digests").glob(".*.new"),
    ]
    return things + [_thing("leftovers", "", path) for path in sorted(left)]


def _artifact(entry: Entry) -> Candidate:
    """Nobody holds a key's lock while he fetches it, so what is fetched has none; the stage that takes it is known by its own."""
    if entry.path.parts[-3] == "fetched":
        return _thing("fetched", entry.stage, entry.path)
    return _thing("artifacts", entry.stage, entry.path, key=entry.key)


def _set_aside(path: Path) -> Candidate:
    """Something in quarantine; its name ends with the moment, in nanoseconds, and its files are older."""
    thing, moment = _thing("quarantine", path.name.partition("-")[0], path), path.name.rpartition("-")[2]
    return thing._replace(touched=max(thing.touched, int(moment) / 1e9 if moment.isdecimal() else 0.0))


def _thing(kind: str, stage: str, path: Path, key: str = "") -> Candidate:
    return Candidate(kind, stage, path, *measure(path), key)


def measure(path: Path) -> tuple[int, float]:
    """Bytes of a file or folder, and when something in it was last changed (seconds since the epoch)."""
    places = [
        path,
        *(Path(parent, name) for parent, folders, files in os.walk(path) for name in (*folders, *files)),
    ]
    size, touched = 0, 0.0
    for place in places:
        with suppress(FileNotFoundError):
            about = place.lstat()
            size += 0 if place.is_dir() and not place.is_symlink() else about.st_size
            touched = max(touched, about.st_mtime)
    return size, touched


def _stage_of(partial: Path) -> str:
    try:
        return str(json.loads((partial / "job.json").read_text())["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _notes(home: Path, going: set[Path]) -> list[Candidate]:
    """Remembered digests of files that are gone, or go."""
    notes = []
    for note in sorted((home / "digests").glob("*.json")):
        try:
            path = Path(json.loads(note.read_text())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not path.exists() or going & {*path.parents}:
            notes.append(_thing("digests", "", note))
    return notes


def remove(home: Path, going: list[Candidate]) -> dict[Path, str]:
    """Remove things; gives why, for those that were left after all."""
    refused = {}
    for thing in going:
        try:
            _remove(home, thing)
        except _InUse as reason:
            refused[thing.path] = str(reason)
        except OSError as error:
            refused[thing.path] = error.strerror or str(error)
    with suppress(OSError):
        (home / TRASH).rmdir()
    return refused


class _InUse(Exception):
    """Somebody has come for it since it was looked at."""


def _remove(home: Path, thing: Candidate) -> None:
    if thing.kind == "locks":
        _remove_life_line(thing.path)
    elif thing.path.is_file():
        thing.path.unlink(missing_ok=True)
    elif thing.key:
        with Store(home).lock(thing.key, on_wait=_refuse):
            away = _away(home, thing)
        shutil.rmtree(away)
    else:
        shutil.rmtree(_away(home, thing))


def _refuse() -> None:
    raise _InUse("in use")


def _away(home: Path, thing: Candidate) -> Path:
    """Rename a folder out of everybody's sight: nobody may find, or go on from, half of it."""
    if measure(thing.path)[1] > thing.touched:
        raise _InUse("changed meanwhile")
    if thing.path.parent.name == TRASH:
        return thing.path
    (home / TRASH).mkdir(exist_ok=True)
    away = home / TRASH / f"{thing.kind}-{time.time_ns()}"
    os.rename(thing.path, away)
    return away


def _remove_life_line(path: Path) -> None:
    """The locks of keys stay: of somebody who has just opened one nobody knows, and he would hold a lock that no longer has a name."""
    lock = try_acquire(path)
    if lock is None:
        _refuse()
    else:
        with lock:
            path.unlink()


def _show(found: Survey, refused: dict[Path, str], *, dry_run: bool, now: float) -> None:
    """What went or would go: with ``dry_run`` thing by thing, always by kind."""
    screen = console()
    if dry_run and found.goes:
        screen.print(_listed(found.goes, now))
        screen.print()
    gone = [thing for thing in found.goes if thing.path not in refused]
    if gone:
        screen.print(_by_kind("Would free" if dry_run else "Freed", gone))
    else:
        screen.print("Nothing to free.")
    for thing in found.goes:
        if thing.path in refused:
            screen.print(
                f"Left       {thing.kind}: {thing.stage} {thing.path.name[:12]} ({refused[thing.path]})",
                markup=False,
                soft_wrap=True,
            )
    if found.stays:
        size = sum(thing.size for thing in found.stays) / MB
        screen.print(
            f"{len(found.stays)} artifacts stay, {size:.1f} MB: recent runs, registered models or work going on reach them.",
            markup=False,
        )


def _by_kind(title: str, things: list[Candidate]) -> Table:
    table = _table(title, "number", "MB")
    for kind in dict.fromkeys(thing.kind for thing in things):
        of_kind = [thing for thing in things if thing.kind == kind]
        table.add_row(kind, *_sum(of_kind))
    table.add_row("all", *_sum(things))
    return table


def _sum(things: list[Candidate]) -> tuple[str, str]:
    return str(len(things)), f"{sum(thing.size for thing in things) / MB:.1f}"


def _listed(things: list[Candidate], now: float) -> Table:
    table = _table("", "stage", "key", "MB", "age", right=("MB", "age"))
    for thing in things:
        table.add_row(
            thing.kind, thing.stage, thing.path.name[:12], f"{thing.size / MB:.1f}", _age(now - thing.touched)
        )
    return table


def _table(*columns: str, right: tuple[str, ...] = ("number", "MB")) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def _age(seconds: float) -> str:
    return f"{seconds / DAY:.0f} days" if seconds >= 2 * DAY else f"{seconds / 3600:.0f} h"
