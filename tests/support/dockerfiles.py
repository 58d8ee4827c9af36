"""Read the Dockerfiles, and what pyproject.toml says of the project."""

import re
import tomllib
from typing import Any

from tests.support.paths import ROOT

FOLDER = ROOT / "docker"
DOCKERFILES = {path.name.removesuffix(".Dockerfile"): path for path in sorted(FOLDER.glob("*.Dockerfile"))}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(image: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions in order: the word, and the rest on one line."""
    lines = [
        line for line in DOCKERFILES[image].read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()
    ]
