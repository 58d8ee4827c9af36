"""Compute SHA-256 of files and folders; cache it for large files that have not changed since."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tasks.system.files import replace_text

LARGE = 64 * 2**20  # bytes; below, a file is hashed each time


def canonical(value: Any) -> bytes:
    """Return canonical JSON: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(path: Path, *, memory: Path | None = None, large: int = LARGE) -> str:
    """Return the SHA-256 of a file.

    From ``large`` bytes on it is cached in the folder ``memory``, for as long as size, times and inode stay
    the same.
    """
    stat = path.stat()
    if memory is None or stat.st_size < large:
        return _hash(path)
    note = memory / f"{digest_of(str(path.resolve()))[:40]}.json"
    # ctime moves with every write and cannot be set back, unlike mtime
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]
    try:
        known = json.loads(note.read_text())
        if known["identity"] == identity:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache entry, or a truncated one: hash again
    sha256 = _hash(path)
    memory.mkdir(parents=True, exist_ok=True)
    replace_text(note, json.dumps({"path": str(path), "identity": identity, "sha256": sha256}))
    return sha256


def folder_files(folder: Path) -> dict[str, Path]:
    """Return every file below ``folder`` by relative path, without hidden ones (download caches, .git)."""
    files: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = Path(parent, name)
                files[path.relative_to(folder).as_posix()] = path
    return dict(sorted(files.items()))


def folder_digest(folder: Path, *, memory: Path | None = None, large: int = LARGE) -> str:
    """Return the SHA-256 over {relative path: sha256} of the files below ``folder``."""
    return digest_of(
        {name: file_digest(path, memory=memory, large=large) for name, path in folder_files(folder).items()}
    )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
