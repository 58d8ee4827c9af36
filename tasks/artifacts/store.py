"""Store artifacts under keys: the hash of everything that an artifact was built from.

    HOME/objects/<stage>/<key>/   an artifact's files + manifest.json (sha256 of every file, written last)
    HOME/partial/<key>/           a running or killed stage: job.json, metrics.jsonl, checkpoints/, artifact/
    HOME/locks/<key>.lock         held with flock while a stage is built; freed when the holder dies
    HOME/quarantine/              artifacts that no longer match their manifest
    HOME/digests/                 cached digests of large files

key = sha256 of {schema, stage, code, job, input digests}, without names, paths and the machine.
``Step.recipe`` in artifact.py collects these, code_version.py the code.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from tasks.system.files import replace_text, sync_folder, sync_path
from tasks.system.hashing import digest_of, file_digest
from tasks.system.locks import acquire

SCHEMA = 3  # 3: code is hashed without the paths of its files
OTHER_SCHEMA = (
    "built by an earlier version of alignflow, whose keys are computed differently; it is rebuilt once"
)


class Manifest(TypedDict):
    """manifest.json of an artifact."""

    schema: int
    stage: str
    key: str
    digest: str  # over {relative path: sha256}
    files: dict[str, str]  # sha256 by relative path
    job: dict[str, Any]
    inputs: dict[str, str]  # digest of the files that are read of each input, by its name
    origins: dict[str, str]  # digest of the whole artifact that these files belong to
    sources: dict[str, str]  # digest of each file of the program's code
    seconds: float
    peak_mb: float
    created: float  # seconds since the epoch


class Recipe(NamedTuple):
    """Everything that an artifact's content depends on."""

    stage: str
    job: dict[str, Any]
    inputs: dict[str, str]
    sources: dict[str, str]
    origins: dict[str, str]  # digests of the artifacts that the inputs belong to: not in the key

    @property
    def key(self) -> str:
        """Return the hash of the recipe."""
        version = digest_of(
            sorted(self.sources.values())
        )  # without paths: moving a file must rebuild nothing
        return digest_of(
            {
                "schema": SCHEMA,
                "stage": self.stage,
                "version": version,
                "job": self.job,
                "inputs": self.inputs,
            }
        )


def home() -> Path:
    """Return the absolute path of the folder that holds everything.

    It is ALIGNFLOW_HOME, else .alignflow in the working directory.
    """
    return Path(os.environ.get("ALIGNFLOW_HOME") or ".alignflow").expanduser().absolute()


class Store:
    """The artifacts of one home."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry(self, stage: str, key: str) -> Path:
        """Return the folder of a finished artifact."""
        return self.root / "objects" / stage / key

    def partial(self, key: str) -> Path:
        """Return the folder in which an artifact is built."""
        return self.root / "partial" / key

    def lookup(self, stage: str, key: str) -> Manifest | None:
        """Return the manifest of an artifact that is complete and unaltered, else None."""
        try:
            found: Manifest = json.loads((self.entry(stage, key) / "manifest.json").read_text())
            files = self._digests(self.entry(stage, key))
            intact = (
                found["schema"] == SCHEMA
                and found["key"] == key
                and files == found["files"]
                and digest_of(files) == found["digest"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if intact else None

    def quarantine(self, stage: str, key: str) -> Path | None:
        """Move a broken artifact to quarantine/; return its new path, or None if there is no artifact.

        The caller holds the key's lock.
        """
        entry = self.entry(stage, key)
        if not entry.exists():
            return None
        moved = self.root / "quarantine" / f"{stage}-{key[:12]}-{time.time_ns()}"
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.rename(entry, moved)
        return moved

    @contextmanager
    def lock(self, key: str, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold the key's lock and yield its file descriptor.

        A program inherits the descriptor, so the lock lasts until the program has ended.
        """
        with acquire(self.root / "locks" / f"{key}.lock", on_wait=on_wait) as file:
            yield file.fileno()

    def commit(self, recipe: Recipe, *, seconds: float, peak_mb: float) -> Manifest:
        """Rename the finished partial/<key>/artifact to objects/<stage>/<key>; return its manifest."""
        folder = self.partial(recipe.key) / "artifact"
        assert not (folder / "manifest.json").exists(), "manifest.json is the store's own file"
        sync_folder(folder)
        files = self._digests(folder)
        manifest = Manifest(
            schema=SCHEMA, stage=recipe.stage, key=recipe.key, digest=digest_of(files), files=files,
            job=recipe.job, inputs=recipe.inputs, origins=recipe.origins, sources=recipe.sources,
            seconds=round(seconds, 3), peak_mb=round(peak_mb, 1), created=time.time(),
        )  # fmt: skip
        replace_text(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        entry = self.entry(recipe.stage, recipe.key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        os.rename(folder, entry)
        sync_path(entry.parent)
        return manifest

    def discard_partial(self, key: str) -> None:
        """Remove the folder in which an artifact was built."""
        shutil.rmtree(self.partial(key), ignore_errors=True)

    def manifests(self, stage: str) -> list[Manifest]:
        """Return the manifests of the stage's artifacts that can be read, without verifying their files."""
        manifests = []
        for path in (self.root / "objects" / stage).glob("*/manifest.json"):
            try:
                manifests.append(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
        return manifests

    def _digests(self, folder: Path) -> dict[str, str]:
        paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        return {
            name: file_digest(path, memory=self.root / "digests")
            for name, path in names.items()
            if name != "manifest.json"
        }


def explain_rebuilds(stages: list[str]) -> str:
    """Return a sentence about the stages whose artifacts are all of an earlier version, "" if none are."""
    store = Store(home())
    outdated = []
    for stage in stages:
        schemas = {manifest.get("schema") for manifest in store.manifests(stage)}
        if schemas and SCHEMA not in schemas:
            outdated.append(stage)
    if not outdated:
        return ""
    return (
        f"The stored artifacts of {', '.join(outdated)} are of an earlier version of alignflow, "
        "whose keys are computed differently; they are rebuilt once"
    )


def list_changes(recipe: Recipe, before: Manifest) -> list[str]:
    """Return what differs between a recipe and an earlier artifact.

    For example 'ppo.clip_range 0.2 -> 0.3', 'input model', 'code tasks/programs/ppo.py'.
    """
    if before["schema"] != SCHEMA:
        return [OTHER_SCHEMA]
    old, new = flatten(before["job"]), flatten(recipe.job)
    differences = [
        f"{name} {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    differences += [f"input {name}" for name in _different(before["inputs"], recipe.inputs)]
    return differences + [f"code {name}" for name in _different(before["sources"], recipe.sources)]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as {dotted path: value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf
        for name, child in value.items()
        for path, leaf in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _different(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
