"""What stages take and give: plain values that any process on any machine can read."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from tasks.artifacts.code_version import sources_of
from tasks.artifacts.store import SCHEMA, Manifest, Recipe, home
from tasks.config.jobs import Job
from tasks.system.hashing import digest_of, file_digest, folder_digest

WEIGHTS = ".safetensors"


class Artifact(TypedDict):
    """A stage's result as it is handed on: plain JSON that means the same on every machine."""

    stage: str  # "given" for what the user brought
    key: str
    digest: str
    path: str  # inside the artifact: the file or folder that is meant, "" for all; of what the user brought: where it lies
    files: dict[str, str]  # sha256 by path of the files that are meant; none of what the user brought
    seconds: float  # spent on it in this run
    peak_mb: float  # of the process that built it
    cached: bool
    metrics: dict[str, Any]
    warnings: list[str]  # what its user should know before trusting it


class Step(NamedTuple):
    """What a stage takes. ``shown`` are the metrics worth watching while it runs, ``kind`` is the kind of machine it wants."""

    stage: str
    job: Job
    inputs: dict[str, Artifact]
    shown: tuple[str, ...] = ()
    kind: Literal["cpu", "gpu"] = "gpu"

    @property
    def recipe(self) -> Recipe:
        contents = {name: content(artifact) for name, artifact in self.inputs.items()}
        return Recipe(
            self.stage,
            self.job.key_settings(),
            contents,
            sources_of(self.stage),
            {name: artifact["digest"] for name, artifact in self.inputs.items()},
        )


def code_of(stage: str) -> dict[str, str]:
    """What two machines must have alike to work on a stage together: its code, and how artifacts are told of."""
    return sources_of(stage) | {"the schema of artifacts": str(SCHEMA)}


def user_artifact(path: str | Path) -> Artifact:
    """A file or folder that the user brought, known by its content."""
    place = Path(os.path.abspath(Path(path).expanduser()))
    return Artifact(
        stage="given", key="", digest=content_digest(place), path=str(place), files={},
        seconds=0.0, peak_mb=0.0, cached=True, metrics={}, warnings=[],
    )  # fmt: skip


def content_digest(place: Path) -> str:
    """Digest of a file or folder that no stage made."""
    memory = home() / "digests"
    return folder_digest(place, memory=memory) if place.is_dir() else file_digest(place, memory=memory)


def stage_artifact(manifest: Manifest, summary: dict[str, Any], *, cached: bool, seconds: float) -> Artifact:
    """A stage's artifact, from its manifest and its summary.json."""
    return Artifact(
        stage=manifest["stage"], key=manifest["key"], digest=manifest["digest"], path="", files=manifest["files"],
        seconds=round(seconds, 3), peak_mb=manifest["peak_mb"], cached=cached,
        metrics=summary.get("metrics", {}), warnings=summary.get("warnings", []),
    )  # fmt: skip


def content(artifact: Artifact) -> str:
    """Digest of what is meant: an input whose other files change is still the same input. "" for what is still to be built."""
    return digest_of(artifact["files"]) if artifact["files"] else artifact["digest"]


def within(artifact: Artifact, name: str) -> Artifact:
    """A file or folder of an artifact as an input; what the user brought is taken whole."""
    return artifact if artifact["stage"] == "given" else {**only(artifact, name), "path": name}


def only(artifact: Artifact, *names: str) -> Artifact:
    """An artifact as an input of a stage that looks at these files and folders alone."""
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
    """An artifact as an input of a stage that does not look at model weights."""
    return {
        **artifact,
        "files": {path: sha256 for path, sha256 in artifact["files"].items() if not path.endswith(WEIGHTS)},
    }
