"""Find, fetch and publish artifacts in MLflow by key, so that machines share nothing but the servers.

A stage's artifact lies under its key in the MLflow run that built it. A machine that lacks it fetches it file
by file into HOME/fetched/<stage>/<key>/, and compares every file with its manifest's sha256 before it is
used. A user's own files are kept in the same way, under the digest of their content.
"""

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tasks.artifacts.artifact import Artifact, content_digest
from tasks.artifacts.store import SCHEMA, Manifest, Store, home
from tasks.system.errors import InputMissing
from tasks.system.files import replace_text
from tasks.system.hashing import digest_of, file_digest, folder_files
from tasks.tracking import runs
from tasks.tracking.client import Tracker

NUM_DOWNLOADS = 8  # files that are fetched at the same time; each takes several requests
MANIFEST, SUMMARY = "manifest.json", "summary.json"


class Published(NamedTuple):
    """An artifact in MLflow."""

    run_id: str
    manifest: Manifest
    summary: dict[str, Any]


def find_published(tracker: Tracker, key: str) -> Published | None:
    """Return the artifact with this key in MLflow; None if none has an intact manifest and summary."""
    for run_id, digest in runs.find_built(tracker, key):
        with tempfile.TemporaryDirectory() as name:
            manifest = _read_manifest(tracker.download(run_id, f"{key}/{MANIFEST}", Path(name)), key, digest)
            if manifest and SUMMARY not in manifest["files"]:
                return Published(run_id, manifest, {})
            summary = tracker.download(run_id, f"{key}/{SUMMARY}", Path(name)) if manifest else None
            if manifest and summary and file_digest(summary) == manifest["files"][SUMMARY]:
                return Published(run_id, manifest, json.loads(summary.read_text()))
        runs.mark_damaged(tracker, run_id)
    return None


def _read_manifest(path: Path | None, key: str, digest: str) -> Manifest | None:
    """Return the manifest if it is intact and of the artifact with this key and digest."""
    try:
        manifest: Manifest = json.loads(path.read_text()) if path else {}  # type: ignore[typeddict-item]
        is_intact = (
            manifest["schema"] == SCHEMA
            and manifest["key"] == key
            and digest_of(manifest["files"]) == manifest["digest"] == digest
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if is_intact else None


def locate(artifact: Artifact, tracker: Tracker) -> Path:
    """Return the path of an artifact, or its named part, on this machine; fetch what is missing.

    Raises InputMissing.
    """
    if artifact["stage"] == "given":
        return _locate_users_files(artifact, tracker)
    store = Store(home())
    stored = store.lookup(artifact["stage"], artifact["key"])
    if stored and stored["digest"] == artifact["digest"]:
        return store.entry(artifact["stage"], artifact["key"]) / artifact["path"]
    folder = home() / "fetched" / artifact["stage"] / artifact["key"]
    manifest = _manifest(tracker, folder, artifact["key"], artifact["digest"])
    _fetch(tracker, manifest, list(artifact["files"]), folder)
    return folder / artifact["path"]


def _locate_users_files(artifact: Artifact, tracker: Tracker) -> Path:
    """Return the path that the user named if its content is the same on this machine, else a fetched copy."""
    digest, place = artifact["digest"], Path(artifact["path"])
    if place.exists() and content_digest(place) == digest:
        return place
    folder = home() / "fetched" / "given" / digest
    manifest = _manifest(tracker, folder, digest)
    _fetch(tracker, manifest, list(manifest["files"]), folder)
    copy = folder / manifest["job"]["name"]
    if content_digest(copy) != digest:
        raise InputMissing([place.name])
    return copy


def _manifest(tracker: Tracker, folder: Path, key: str, digest: str | None = None) -> Manifest:
    """Return the manifest of a fetched artifact, from ``folder`` or else from MLflow. Raises InputMissing."""
    known = _read_manifest(folder / MANIFEST, key, digest) if digest else None
    if known:
        return known
    found = find_published(tracker, key)
    if found is None or (digest and found.manifest["digest"] != digest):
        raise InputMissing([folder.parent.name])
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / MANIFEST, json.dumps(found.manifest))
    return found.manifest


def _fetch(tracker: Tracker, manifest: Manifest, names: list[str], folder: Path) -> None:
    """Download the files that are missing in ``folder``. Raises InputMissing if MLflow has others or none."""
    digests = manifest["files"]
    missing = [name for name in names if not _is_intact(folder / name, digests[name])]
    found = find_published(tracker, manifest["key"]) if missing else None
    if missing and (found is None or found.manifest["files"] != digests):
        raise InputMissing([manifest["stage"]])
    if found:
        with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
            list(pool.map(partial(_fetch_file, tracker, found, folder), missing))


def _fetch_file(tracker: Tracker, found: Published, folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        path = tracker.download(found.run_id, f"{found.manifest['key']}/{name}", Path(temporary))
        if path is None or file_digest(path) != found.manifest["files"][name]:
            runs.mark_damaged(tracker, found.run_id)
            raise InputMissing([found.manifest["stage"]])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / name)


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_digest(path, memory=home() / "digests") == sha256


def publish(artifact: Artifact, tracker: Tracker, *, parent: str | None) -> bool:
    """Upload a stage's artifact or a user's files for other machines.

    Return False if they are no longer here.
    """
    if artifact["stage"] == "given":
        return _publish_users_files(artifact, tracker, parent)
    stage, key = artifact["stage"], artifact["key"]
    store = Store(home())
    manifest = store.lookup(stage, key)
    if manifest is None or manifest["digest"] != artifact["digest"]:
        return False
    job, inputs = manifest["job"], manifest["origins"]
    with runs.stage_run(tracker, stage, key, job, parent=parent, inputs=inputs) as run:
        run.upload_artifact(manifest, store.entry(stage, key))
    return True


def _publish_users_files(artifact: Artifact, tracker: Tracker, parent: str | None) -> bool:
    key, place = artifact["digest"], Path(artifact["path"])
    if not place.exists() or content_digest(place) != key:
        return False
    name = "content" if place.is_dir() else place.name
    files = {name: place}
    if place.is_dir():
        files = {f"{name}/{path}": file for path, file in folder_files(place).items()}
    digests = {path: file_digest(file, memory=home() / "digests") for path, file in files.items()}
    manifest = Manifest(
        schema=SCHEMA, stage="given", key=key, digest=digest_of(digests), files=digests, job={"name": name},
        inputs={}, origins={}, sources={}, seconds=0.0, peak_mb=0.0, created=time.time(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path, file in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(file.resolve())
        replace_text(folder / MANIFEST, json.dumps(manifest))
        with runs.stage_run(tracker, "given", key, {"path": str(place)}, parent=parent) as run:
            run.upload_artifact(manifest, folder)
    return True
