"""List the artifacts on this machine and check whether they are intact."""

import json
from pathlib import Path
from typing import NamedTuple

from tasks.artifacts.store import SCHEMA
from tasks.system.hashing import digest_of, file_digest


class Entry(NamedTuple):
    """An artifact in objects/ or fetched/. Without a readable manifest it has no digest and no origins."""

    path: Path
    stage: str
    key: str
    digest: str
    origins: tuple[str, ...]  # digests of the artifacts that it was built from


def list_artifacts(home: Path, tiers: tuple[str, ...] = ("objects", "fetched")) -> list[Entry]:
    """Return every artifact on this machine."""
    places = [path for tier in tiers for path in sorted((home / tier).glob("*/*"))]
    return [_entry(path) for path in places if path.is_dir() and not path.name.startswith(".")]


def _entry(path: Path) -> Entry:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return Entry(
            path,
            path.parent.name,
            path.name,
            str(manifest["digest"]),
            tuple(manifest.get("origins", manifest["inputs"]).values()),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Entry(path, path.parent.name, path.name, "", ())


def is_intact(entry: Path, *, deep: bool) -> bool:
    """Return whether an artifact has the files of its manifest, and with ``deep`` also their content.

    With ``deep`` every file is read: a cached digest would not show a damaged disk.
    """
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        digests = manifest["files"]
        if manifest["schema"] != SCHEMA or manifest["key"] != entry.name:
            return False
        if digest_of(digests) != manifest["digest"]:
            return False
        files = {path.relative_to(entry).as_posix() for path in entry.rglob("*") if not path.is_dir()}
        if files - {"manifest.json"} != digests.keys():
            return False
        return not deep or all(file_digest(entry / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
