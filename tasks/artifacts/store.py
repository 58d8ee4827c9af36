"""Content-addressed artifacts: what a stage made is found again by what it was made from.

    HOME/objects/<stage>/<key>/   an artifact's files + manifest.json (sha256 of every file, written last)
    HOME/partial/<key>/           a stage at work, or what a killed one left: job.json, metrics.jsonl, checkpoints/, artifact/, log.txt
    HOME/locks/<key>.lock         held with flock while a stage is built; the kernel frees it, whatever kills the holder
    HOME/quarantine/              entries that no longer match their manifest
    HOME/digests/                 remembered digests of large files

key = sha256 of {schema, stage, stage version, job, input digests}. Names, paths and the machine are not in it.
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
OTHER_SCHEMA = "built by an earlier version of alignflow, whose keys are made otherwise; it is rebuilt once"


class Manifest(TypedDict):
    """manifest.json of an artifact."""

    schema: int
    stage: str
    key: str
    digest: str  # over {relative path: sha256}
    files: dict[str, str]  # sha256 by relative path
    job: dict[str, Any]
    inputs: dict[str, str]  # digest of what is taken of each input, by its name
    origins: dict[str, str]  # digest of the whole artifact that it is part of
    sources: dict[str, str]  # digest by file of the program
    seconds: float
    peak_mb: float
    created: float  # seconds since the epoch


class Recipe(NamedTuple):
    """Everything an artifact's content depends on."""

    stage: str
    job: dict[str, Any]
    inputs: dict[str, str]
    sources: dict[str, str]
    origins: dict[str, str]  # where the inputs are from: no part of the key

    @property
    def key(self) -> str:
        version = digest_of(sorted(self.sources.values()))  # not by path: moving a file must rebuild nothing
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
    """The one folder everything is kept in: ALIGNFLOW_HOME, else .alignflow in the working directory; absolute."""
    return Path(os.environ.get("ALIGNFLOW_HOME") or ".alignflow").expanduser().absolute()


class Store:
    """The artifacts of one home."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry(self, stage: str, key: str) -> Path:
        return self.root / "objects" / stage / key

    def partial(self, key: str) -> Path:
        return self.root / "partial" / key

    def lookup(self, stage: str, key: str) -> Manifest | None:
        """The manifest of an artifact that is there, complete and unaltered; None for anything else."""
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
        """Move a broken entry out of the way, and say where; call it with the key's lock held."""
        entry = self.entry(stage, key)
        if not entry.exists():
            return None
        away = self.root / "quarantine" / f"{stage}-{key[:12]}-{time.time_ns()}"
        away.parent.mkdir(parents=True, exist_ok=True)
        os.rename(entry, away)
        return away

    @contextmanager
    def lock(self, key: str, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[int]:
        """Hold the key's lock; gives its file descriptor, which a program inherits so that the lock lasts as long as it can write."""
        with acquire(self.root / "locks" / f"{key}.lock", on_wait=on_wait) as file:
            yield file.fileno()

    def commit(self, recipe: Recipe, *, seconds: float, peak_mb: float) -> Manifest:
        """Turn the finished partial/<key>/artifact into objects/<stage>/<key>: all of it, or nothing."""
        made = self.partial(recipe.key) / "artifact"
        assert not (made / "manifest.json").exists(), "manifest.json is the store's own file"
        sync_folder(made)
        files = self._digests(made)
        manifest = Manifest(
            schema=SCHEMA, stage=recipe.stage, key=recipe.key, digest=digest_of(files), files=files,
            job=recipe.job, inputs=recipe.inputs, origins=recipe.origins, sources=recipe.sources,
            seconds=round(seconds, 3), peak_mb=round(peak_mb, 1), created=time.time(),
        )  # fmt: skip
        replace_text(made / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        entry = self.entry(recipe.stage, recipe.key)
        entry.parent.mkdir(parents=True, exist_ok=True)
        os.rename(made, entry)
        sync_path(entry.parent)
        return manifest

    def discard_partial(self, key: str) -> None:
        shutil.rmtree(self.partial(key), ignore_errors=True)

    def newest(self, stage: str) -> Manifest | None:
        """The manifest of the stage's latest artifact, unverified: to say what changed since."""
        manifests = []
        for path in (self.root / "objects" / stage).glob("*/manifest.json"):
            try:
                manifests.append(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue
        return max(manifests, key=lambda manifest: float(manifest["created"]), default=None)

    def _digests(self, folder: Path) -> dict[str, str]:
        paths = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
        names = {path.relative_to(folder).as_posix(): path for path in paths}
        return {
            name: file_digest(path, memory=self.root / "digests")
            for name, path in names.items()
            if name != "manifest.json"
        }


def changes(recipe: Recipe, before: Manifest) -> list[str]:
    """What differs between a recipe and an artifact made earlier: 'ppo.clip_range 0.2 -> 0.3', 'input model', 'code tasks/rlhf/algorithms/losses.py'."""
    if before["schema"] != SCHEMA:
        return [OTHER_SCHEMA]
    old, new = flat(before["job"]), flat(recipe.job)
    told = [
        f"{name} {_short(old.get(name))} -> {_short(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    told += [f"input {name}" for name in _different(before["inputs"], recipe.inputs)]
    return told + [f"code {name}" for name in _different(before["sources"], recipe.sources)]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as {dotted path: value}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        path: leaf
        for name, child in value.items()
        for path, leaf in flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _different(old: dict[str, str], new: dict[str, str]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
