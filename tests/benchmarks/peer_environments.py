"""Peers of the benchmarks: each in an environment of its own, made once."""

import shutil
import subprocess
import venv
from pathlib import Path


def interpreter(place: Path, needs: tuple[str, ...]) -> Path:
    """The Python of the environment at ``place``; made with what it needs when it is not there."""
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], check=True)
        (place / ".ready").touch()
    return python
