"""List the artifacts on this machine and check whether they are intact."""

import json
from pathlib import Path
from typing import NamedTuple

from tasks.artifacts.store import SCHEMA
from tasks.system.hashing import digest_of, file_digest


class Entry(NamedTuple):
    """An artifact in objects/ or fetched/. Where its manifest cannot be read, it has no digest and no inputs."""

    path: Path
    stage: str
    key: str
    digest: str
    origins: tuple[str, ...]  # digests of the artifacts that it was made from


def entries(home: Path, tiers: tuple[str, ...] = ("objects", "fetched")) -> list[Entry]:
    """Every artifact on this machine."""
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


def intact(entry: Path, *, deep: bool) -> bool:
    """Whether an artifact has the files of its manifest, and with ``deep`` their bytes, read anew: a remembered digest would not show decay."""
    try:
        manifest = json.loads((entry / "manifest.json").read_text())
        digests = manifest["files"]
        there = {path.relative_to(entry).as_posix() for path in entry.rglob("*") if not path.is_dir()} - {
            "manifest.json"
        }
        told = (
            manifest["schema"] == SCHEMA
            and manifest["key"] == entry.name
            and digest_of(digests) == manifest["digest"]
        )
        return (
            told
            and there == digests.keys()
            and not (deep and any(file_digest(entry / name) != digests[name] for name in digests))
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
