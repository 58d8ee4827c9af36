"""Prepare empty databases of Prefect and MLflow with all their tables, once per environment.

python -m tasks.tracking.databases        part of `make setup`

Without a database each tool runs all its migrations, which takes 5 to 20 seconds of a new home's first run.
Copying a migrated database takes none. A home without a copy, or with one of another version, works too, only
slower.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from tasks.system.files import replacing


def template(tool: str) -> Path:
    """Return the path of the tool's empty database in this environment."""
    return Path(sys.prefix) / "share" / "alignflow" / f"{tool}-{version(tool)}.db"


def needs_escaping(path: Path) -> bool:
    """Return whether SQLAlchemy's URL must escape the path: ? begins options, and libraries expand %."""
    return not {"?", "#", "%"}.isdisjoint(str(path))


def address(path: Path, driver: str = "") -> str:
    """Return the URL by which SQLAlchemy opens a SQLite file, whatever characters its path has."""
    if needs_escaping(path):
        return f"sqlite{driver}:///file:{quote(str(path))}?uri=true"
    return f"sqlite{driver}:///{path}"


def lay(tool: str, path: Path) -> None:
    """Copy the tool's empty database to ``path``, unless a file is there or no database was prepared."""
    if path.exists() or not template(tool).exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, keep_existing=True) as copy:  # another process may have a database there by now
        shutil.copyfile(template(tool), copy)


def prepare() -> None:
    """Let both tools create their tables, each in its own database; exit with a tool's output if it fails."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        commands = {
            "prefect": ["prefect", "server", "database", "upgrade", "--yes"],
            "mlflow": ["mlflow", "db", "upgrade", address(root / "mlflow.db")],
        }
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))
        }
        # run in another folder: a .env or json.py in the current one must not be read
        quiet = {
            "PYTHONSAFEPATH": "1",
            "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": name,
        }
        running = {
            tool: subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=root,
                env=inherited | quiet,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for tool, command in commands.items()
            if not template(tool).exists()
        }
        # wait for both before a failure of one is reported
        outputs = {tool: process.communicate()[0] for tool, process in running.items()}
        for tool, process in running.items():
            if process.returncode:
                sys.exit(f"{' '.join(commands[tool])} failed:\n{outputs[tool].decode(errors='replace')}")
            _keep(root / f"{tool}.db", template(tool))


def _keep(database: Path, target: Path) -> None:
    """Write the database to ``target`` as one file without a journal."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as packed, closing(sqlite3.connect(database)) as connection:
        connection.execute("VACUUM INTO ?", (str(packed),))


if __name__ == "__main__":
    prepare()
