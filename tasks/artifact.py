"""What stages take and give: plain values that any process can read."""

import os
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from tasks.digests import file_digest, folder_digest
from tasks.programs.config import Job
from tasks.sources import sources_of
from tasks.store import Recipe, home


class Artifact(TypedDict):
    """A stage's result as it is handed on: plain JSON."""

    stage: str  # "given" for what the user brought
    key: str
    digest: str
    path: str
    seconds: float  # spent on it in this run
    peak_mb: float  # of the process that built it
    cached: bool
    metrics: dict[str, Any]
    warnings: list[str]  # what its user should know before trusting it


class Step(NamedTuple):
    """What a stage takes. ``shown`` are the metrics worth watching while it runs."""

    stage: str
    job: Job
    inputs: dict[str, Artifact]
    shown: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        job = self.job.model_dump(mode="json")
        if isinstance(job.get("source"), dict):
            job["source"].pop("path", None)  # the dump's content is an input; where it lies does not matter
        return Recipe(self.stage, job, {name: artifact["digest"] for name, artifact in self.inputs.items()}, sources_of(self.stage))


def given(path: str | Path) -> Artifact:
    """A file or folder that the user brought, known by its content."""
    place, memory = Path(os.path.abspath(Path(path).expanduser())), home() / "digests"
    digest = folder_digest(place, memory=memory) if place.is_dir() else file_digest(place, memory=memory)
    return Artifact(stage="given", key="", digest=digest, path=str(place), seconds=0.0, peak_mb=0.0, cached=True, metrics={}, warnings=[])


def within(artifact: Artifact, name: str) -> Artifact:
    """A file or folder of an artifact as an input; what the user brought is taken whole."""
    return artifact if artifact["stage"] == "given" else {**artifact, "path": str(Path(artifact["path"], name))}
