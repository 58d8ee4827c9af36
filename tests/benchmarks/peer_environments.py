"""Create the virtual environments of the libraries that benchmarks compare with."""

import shutil
import subprocess
import venv
from pathlib import Path


def create_environment(place: Path, needs: tuple[str, ...]) -> Path:
    """Return the Python of the environment in a folder; create the environment if it is not there."""
    python = place / "bin" / "python"
    if not (place / ".ready").exists():
        shutil.rmtree(place, ignore_errors=True)
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *needs], check=True)
        (place / ".ready").touch()
    return python
