"""The far tier: artifacts in MLflow, found by key and verified by digest, so that machines share nothing but the servers.

A stage's artifact lies under its key in the MLflow run that built it. What a machine lacks it fetches file by file into HOME/fetched/<stage>/<key>/;
every file is compared with its manifest's sha256 before it is used. What a user brought is kept in the same way, under its digest.
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
from tasks.tracking import client, runs

AT_ONCE = 8  # files that are fetched at a time; each takes several requests
MANIFEST, SUMMARY = "manifest.json", "summary.json"


class Published(NamedTuple):
    run_id: str
    manifest: Manifest
    summary: dict[str, Any]


def published(key: str) -> Published | None:
    """The artifact with this key in MLflow, by its manifest and summary; None where there is none, or none that is whole."""
    for run_id, digest in runs.built(key):
        with tempfile.TemporaryDirectory() as name:
            text = client.download(run_id, f"{key}/{MANIFEST}", Path(name))
            manifest = _parsed(text, key, digest)
            if manifest and SUMMARY not in manifest["files"]:
                return Published(run_id, manifest, {})
            summary = client.download(run_id, f"{key}/{SUMMARY}", Path(name)) if manifest else None
            if manifest and summary and file_digest(summary) == manifest["files"][SUMMARY]:
                return Published(run_id, manifest, json.loads(summary.read_text()))
        runs.mark_damaged(run_id)
    return None


def _parsed(path: Path | None, key: str, digest: str) -> Manifest | None:
    """A manifest, if it is whole and vouches for ``key`` with ``digest``."""
    try:
        manifest: Manifest = json.loads(path.read_text()) if path else {}  # type: ignore[typeddict-item]
        whole = (
            manifest["schema"] == SCHEMA
            and manifest["key"] == key
            and digest_of(manifest["files"]) == manifest["digest"] == digest
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def locate(artifact: Artifact) -> Path:
    """Where an artifact, or the part of it that is meant, lies on this machine; what is missing is fetched first. Raises InputMissing."""
    if artifact["stage"] == "given":
        return _located_given(artifact)
    store = Store(home())
    here = store.lookup(artifact["stage"], artifact["key"])
    if here and here["digest"] == artifact["digest"]:
        return store.entry(artifact["stage"], artifact["key"]) / artifact["path"]
    folder = home() / "fetched" / artifact["stage"] / artifact["key"]
    manifest = _manifest(folder, artifact["key"], artifact["digest"])
    _fetch(manifest, list(artifact["files"]), folder)
    return folder / artifact["path"]


def _located_given(artifact: Artifact) -> Path:
    """What the user brought: where it was on the machine that started the run if it is the same here, else a fetched copy."""
    digest, place = artifact["digest"], Path(artifact["path"])
    if place.exists() and content_digest(place) == digest:
        return place
    folder = home() / "fetched" / "given" / digest
    manifest = _manifest(folder, digest)
    _fetch(manifest, list(manifest["files"]), folder)
    copy = folder / manifest["job"]["name"]
    if content_digest(copy) != digest:
        raise InputMissing([place.name])
    return copy


def _manifest(folder: Path, key: str, digest: str | None = None) -> Manifest:
    """The manifest of a fetched artifact, from beside its files or from MLflow."""
    known = _parsed(folder / MANIFEST, key, digest) if digest else None
    if known:
        return known
    found = published(key)
    if found is None or (digest and found.manifest["digest"] != digest):
        raise InputMissing([folder.parent.name])
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / MANIFEST, json.dumps(found.manifest))
    return found.manifest


def _fetch(manifest: Manifest, names: list[str], folder: Path) -> None:
    """Bring files into ``folder``, each in place at once and only if it is what the manifest says."""
    digests = manifest["files"]
    missing = [name for name in names if not _intact(folder / name, digests[name])]
    found = published(manifest["key"]) if missing else None
    if missing and (found is None or found.manifest["files"] != digests):
        raise InputMissing([manifest["stage"]])
    if found:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(partial(_fetch_one, found, folder), missing))


def _fetch_one(found: Published, folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as temporary:
        path = client.download(found.run_id, f"{found.manifest['key']}/{name}", Path(temporary))
        if path is None or file_digest(path) != found.manifest["files"][name]:
            runs.mark_damaged(found.run_id)
            raise InputMissing([found.manifest["stage"]])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / name)


def _intact(path: Path, sha256: str) -> bool:
    return path.is_file() and file_digest(path, memory=home() / "digests") == sha256


def publish(artifact: Artifact, *, parent: str | None) -> bool:
    """Put into MLflow what another machine lacks: a stage's artifact, or what the user brought. False where this machine has it no more."""
    if artifact["stage"] == "given":
        return _publish_given(artifact, parent)
    store = Store(home())
    manifest = store.lookup(artifact["stage"], artifact["key"])
    if manifest is None or manifest["digest"] != artifact["digest"]:
        return False
    with runs.stage_run(artifact["stage"], artifact["key"], manifest["job"], parent=parent) as run:
        run.artifact(manifest, store.entry(artifact["stage"], artifact["key"]))
    return True


def _publish_given(artifact: Artifact, parent: str | None) -> bool:
    key, place = artifact["digest"], Path(artifact["path"])
    if not place.exists() or content_digest(place) != key:
        return False
    name = "content" if place.is_dir() else place.name
    files = (
        {f"content/{path}": file for path, file in folder_files(place).items()}
        if place.is_dir()
        else {name: place}
    )
    digests = {path: file_digest(file, memory=home() / "digests") for path, file in files.items()}
    manifest = Manifest(
        schema=SCHEMA, stage="given", key=key, digest=digest_of(digests), files=digests, job={"name": name}, inputs={}, origins={}, sources={},
        seconds=0.0, peak_mb=0.0, created=time.time(),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path, file in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).symlink_to(file.resolve())
        replace_text(folder / MANIFEST, json.dumps(manifest))
        with runs.stage_run("given", key, {"path": str(place)}, parent=parent) as run:
            run.artifact(manifest, folder)
    return True
