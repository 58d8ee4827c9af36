"""Start a PostgreSQL server on loopback, for one test module."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.services.processes import free_port


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """Yield the URL of a server with the databases prefect and mlflow; skip if it is not installed."""
    if not _find_binary("initdb"):
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    user = "postgres" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    folder, port = Path(tempfile.mkdtemp(prefix="alignflow-pg-")), free_port()
    if user:
        shutil.chown(folder, user)

    def run(tool: str, *arguments: str) -> None:
        command = [str(_find_binary(tool)), *arguments]
        subprocess.run(command, user=user, cwd=folder, check=True, capture_output=True)

    run("initdb", "-D", str(folder / "data"), "-U", "alignflow", "--auth", "trust", "--no-sync")
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"
    run("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-o", options, "-w", "start")
    try:
        for name in ("prefect", "mlflow"):
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "alignflow", name)
        yield f"postgresql://alignflow:unused@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def _find_binary(name: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(installed[-1]) if installed else shutil.which(name)
