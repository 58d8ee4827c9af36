"""Define what stages take and return: plain JSON values that any process on any machine can read."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from tasks.artifacts.code_version import source_digests
from tasks.artifacts.store import SCHEMA, Manifest, Recipe, home
from tasks.config.jobs import Job
from tasks.system.hashing import digest_of, file_digest, folder_digest

WEIGHTS = ".safetensors"
Kind = Literal["cpu", "gpu"]  # of machine that a stage wants


class Artifact(TypedDict):
    """The result of a stage, or what the user brought, as an input of other stages."""

    stage: str  # "given" for what the user brought
    key: str
    digest: str
    path: str  # file or folder inside the artifact, "" for all; of what the user brought: its absolute path
    files: dict[
        str, str
    ]  # sha256 by path of the files that an input consists of; empty if the user brought it
    seconds: float  # spent on it in this run
    peak_mb: float  # of the process that built it
    cached: bool
    metrics: dict[str, Any]
    warnings: list[str]  # sentences that its user should know before trusting it
    job: NotRequired[
        dict[str, Any]
    ]  # of a model that another run has trained: the settings it was trained with


class Step(NamedTuple):
    """A stage with its job and inputs.

    ``shown`` are the metrics that are shown while it runs; ``kind`` is the kind of machine that it needs.
    """

    stage: str
    job: Job
    inputs: dict[str, Artifact]
    shown: tuple[str, ...] = ()
    kind: Kind = "gpu"

    @property
    def recipe(self) -> Recipe:
        """Return everything that the artifact depends on."""
        contents = {name: content(artifact) for name, artifact in self.inputs.items()}
        return Recipe(
            self.stage,
            self.job.key_settings(),
            contents,
            source_digests(self.stage),
            {name: artifact["digest"] for name, artifact in self.inputs.items()},
        )


def code_of(stage: str) -> dict[str, str]:
    """Return what must be equal on two machines that build a stage: its code and the schema of artifacts."""
    return source_digests(stage) | {"the schema of artifacts": str(SCHEMA)}


def user_artifact(path: str | Path) -> Artifact:
    """Return a file or folder that the user brought as an artifact, identified by its content."""
    place = Path(os.path.abspath(Path(path).expanduser()))
    return Artifact(
        stage="given", key="", digest=content_digest(place), path=str(place), files={},
        seconds=0.0, peak_mb=0.0, cached=True, metrics={}, warnings=[],
    )  # fmt: skip


def unbuilt_artifact(stage: str) -> Artifact:
    """Return a placeholder for the artifact of a stage that is not built: it has no digest and no files."""
    return Artifact(
        stage=stage, key="", digest="", path="", files={},
        seconds=0.0, peak_mb=0.0, cached=False, metrics={}, warnings=[],
    )  # fmt: skip


def content_digest(place: Path) -> str:
    """Return the digest of a file or folder that no stage built."""
    cache = home() / "digests"
    return folder_digest(place, memory=cache) if place.is_dir() else file_digest(place, memory=cache)


def stage_artifact(manifest: Manifest, summary: dict[str, Any], *, cached: bool, seconds: float) -> Artifact:
    """Return a stage's artifact, from its manifest and its summary.json."""
    return Artifact(
        stage=manifest["stage"], key=manifest["key"], digest=manifest["digest"],
        path="", files=manifest["files"],
        seconds=round(seconds, 3), peak_mb=manifest["peak_mb"], cached=cached,
        metrics=summary.get("metrics", {}), warnings=summary.get("warnings", []),
    )  # fmt: skip


def content(artifact: Artifact) -> str:
    """Return the digest of the files that an input consists of; "" if the artifact is not built yet."""
    return digest_of(artifact["files"]) if artifact["files"] else artifact["digest"]


def within(artifact: Artifact, name: str) -> Artifact:
    """Return one file or folder of an artifact as an input; what the user brought stays whole."""
    return artifact if artifact["stage"] == "given" else {**only(artifact, name), "path": name}


def only(artifact: Artifact, *names: str) -> Artifact:
    """Return an artifact as an input of a stage that reads these files and folders only."""
    if not artifact["files"]:
        return artifact
    files = {
        path: sha256
        for path, sha256 in artifact["files"].items()
        if any(path == name or path.startswith(f"{name}/") for name in names)
    }
    assert all(any(path == name or path.startswith(f"{name}/") for path in files) for name in names), (
        artifact["stage"],
        names,
    )
    return {**artifact, "files": files}


def without_weights(artifact: Artifact) -> Artifact:
    """Return an artifact as an input of a stage that does not read model weights."""
    return {
        **artifact,
        "files": {path: sha256 for path, sha256 in artifact["files"].items() if not path.endswith(WEIGHTS)},
    }
