"""Empty databases of Prefect and MLflow with all their tables, made once per environment.

python -m tasks.tracking.databases        part of `make setup`

A tool that finds no database makes its tables step by step through its whole history, which takes 5 to 20 seconds of every new home's first run. A
copy of a database that has been through it takes none; a home without one, or with another version's, is as right, only slower.
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
    """Where this environment keeps the tool's empty database."""
    return Path(sys.prefix) / "share" / "alignflow" / f"{tool}-{version(tool)}.db"


def needs_escaping(path: Path) -> bool:
    """Whether SQLAlchemy would not read the path as it is in an address: ? begins options, and libraries expand %."""
    return not {"?", "#", "%"}.isdisjoint(str(path))


def address(path: Path, driver: str = "") -> str:
    """Return the address by which SQLAlchemy opens a SQLite file, whatever its path holds."""
    if needs_escaping(path):
        return f"sqlite{driver}:///file:{quote(str(path))}?uri=true"
    return f"sqlite{driver}:///{path}"


def lay(tool: str, path: Path) -> None:
    """Put the tool's empty database at ``path``, unless something is there or none was prepared."""
    if path.exists() or not template(tool).exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, keep_existing=True) as copy:  # another process may have a database there by now
        shutil.copyfile(template(tool), copy)


def prepare() -> None:
    """Let both tools make their tables, each in a database of its own; the process ends with a tool's output when it fails."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        commands = {
            "prefect": ["prefect", "server", "database", "upgrade", "--yes"],
            "mlflow": ["mlflow", "db", "upgrade", address(root / "mlflow.db")],
        }
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))
        }
        # from another folder, and by `-m` alone: a .env or a json.py that lies here is not for them
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
        outputs = {
            tool: process.communicate()[0] for tool, process in running.items()
        }  # both end before either's failure is told
        for tool, process in running.items():
            if process.returncode:
                sys.exit(f"{' '.join(commands[tool])} failed:\n{outputs[tool].decode(errors='replace')}")
            _keep(root / f"{tool}.db", template(tool))


def _keep(database: Path, target: Path) -> None:
    """One file without a journal, in place at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as packed, closing(sqlite3.connect(database)) as connection:
        connection.execute("VACUUM INTO ?", (str(packed),))


if __name__ == "__main__":
    prepare()
