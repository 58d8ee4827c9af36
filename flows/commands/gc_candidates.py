"""List what could be removed from a home, with its size and age."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from flows.commands.gc_roots import RUN_LOCK
from tasks.artifacts.hub_tables import lock_name
from tasks.artifacts.inventory import Entry
from tasks.system.hashing import folder_digest
from tasks.system.locks import is_held

TRASH = "trash"


class Candidate(NamedTuple):
    """A file or folder of the home that may be removed."""

    kind: str  # artifacts, fetched, partial, runs, exports, tokens, hub, quarantine, locks, leftovers
    # or digests
    stage: str
    path: Path
    size: int  # bytes
    touched: float  # when something in it last changed, in seconds since the epoch
    key: str = ""  # of the lock that guards it


def list_candidates(root: Path, found: list[Entry]) -> list[Candidate]:
    """Return all candidates, measured, except the remembered digests."""
    candidates = [_artifact(entry) for entry in found]
    for path in sorted((root / "partial").glob("*")):
        candidates.append(_candidate("partial", _stage_of(path), path, key=path.name))
    candidates += [_candidate("runs", "", path) for path in sorted((root / "runs").glob("*"))]
    candidates += [_candidate("exports", "", path) for path in sorted((root / "exports").glob("*"))]
    for path in sorted((root / "tokens").glob("*")):
        candidates.append(_candidate("tokens", "", path, key=path.name))
    candidates += [
        _candidate("hub", "", path, key=lock_name(path.name))
        for path in sorted((root / "hub").glob("[!.]*/"))
    ]
    candidates += [_in_quarantine(path) for path in sorted((root / "quarantine").glob("*"))]
    run_locks = sorted((root / "locks").glob(f"{RUN_LOCK}*.lock"))
    candidates += [_candidate("locks", "", path) for path in run_locks if not is_held(path)]
    leftovers = [
        *(root / "fetched").glob("*/*/.new-*"),
        *(root / TRASH).glob("*"),
        *root.glob(".*.new"),
        *(root / "digests").glob(".*.new"),
    ]
    candidates += [_candidate("leftovers", "", path) for path in sorted(leftovers)]
    for path in sorted((root / "hub").glob(".*.new")):
        tables = path.name.removeprefix(".").removesuffix(".new")
        candidates.append(_candidate("leftovers", "", path, key=lock_name(tables)))
    return candidates


def list_tables(root: Path, candidates: list[Candidate]) -> list[Entry]:
    """Return the parts of data sets among the candidates, by their names and digests, as stages know them."""
    return [
        Entry(one.path, one.kind, one.path.name, folder_digest(one.path, memory=root / "digests"), ())
        for one in candidates
        if one.kind == "hub"
    ]


def list_digest_notes(root: Path, removed: set[Path]) -> list[Candidate]:
    """Return the remembered digests of files that are gone, or are among ``removed``."""
    notes = []
    for note in sorted((root / "digests").glob("*.json")):
        try:
            path = Path(json.loads(note.read_text())["path"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not path.exists() or removed & {*path.parents}:
            notes.append(_candidate("digests", "", note))
    return notes


def measure(path: Path) -> tuple[int, float]:
    """Return the bytes of a file or folder, and when something in it last changed, in seconds."""
    places = [path]
    for parent, folders, files in os.walk(path):
        places += [Path(parent, name) for name in (*folders, *files)]
    size, touched = 0, 0.0
    for place in places:
        with suppress(FileNotFoundError):
            about = place.lstat()
            size += 0 if place.is_dir() and not place.is_symlink() else about.st_size
            touched = max(touched, about.st_mtime)
    return size, touched


def _artifact(entry: Entry) -> Candidate:
    """Return the candidate of an artifact.

    A fetched one has no lock of its own: fetching takes none, and the stage that uses the artifact holds the
    lock of its own key.
    """
    if entry.path.parts[-3] == "fetched":
        return _candidate("fetched", entry.stage, entry.path)
    return _candidate("artifacts", entry.stage, entry.path, key=entry.key)


def _in_quarantine(path: Path) -> Candidate:
    """Return the candidate of a quarantined artifact.

    Its age counts from the moment in its name, in nanoseconds: its files are older.
    """
    candidate = _candidate("quarantine", path.name.partition("-")[0], path)
    moment = path.name.rpartition("-")[2]
    seconds = int(moment) / 1e9 if moment.isdecimal() else 0.0
    return candidate._replace(touched=max(candidate.touched, seconds))


def _candidate(kind: str, stage: str, path: Path, key: str = "") -> Candidate:
    size, touched = measure(path)
    return Candidate(kind, stage, path, size, touched, key)


def _stage_of(partial: Path) -> str:
    """Return the stage of an unfinished folder; "" if its job.json cannot be read."""
    try:
        return str(json.loads((partial / "job.json").read_text())["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
