"""Run a program that is no stage while the user waits: it reads and writes the user's terminal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tasks.artifacts.code_version import PROGRAMS
from tasks.artifacts.store import home
from tasks.config.jobs import Job
from tasks.config.machine import Machine
from tasks.execution.program_environment import program_environment
from tasks.system.errors import DiskFailure, InputError, StageFailed
from tasks.system.processes import die_with_parent

USAGE = f"{PROGRAMS}.usage"
INTERRUPTED = (-signal.SIGINT, 130)


def run_in_foreground(name: str, job: Job, directory: Path, inputs: Mapping[str, Path] | None = None) -> None:
    """Run ``tasks.programs.usage.<name>`` in ``directory`` to its end.

    Ctrl-C is the program's. Raises InputError if the user must change an input, KeyboardInterrupt if Ctrl-C
    has ended the program, and StageFailed for any other failure.
    """
    record = {
        "stage": name,
        "job": job.model_dump(mode="json"),
        "inputs": {key: str(path) for key, path in (inputs or {}).items()},
        "machine": Machine().model_dump(mode="json"),
    }
    (directory / "job.json").write_text(json.dumps(record))
    log = home() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        status = wait_in_foreground([f"{USAGE}.{name}", str(directory)], stderr=file.fileno())
    if status in INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        raise _failure(name, directory, status, log)


def wait_in_foreground(
    module: list[str], *, environment: Mapping[str, str] | None = None, folder: Path | None = None,
    stderr: int | None = None,
) -> int:  # fmt: skip
    """Run ``python -m`` on the user's terminal and return its exit status.

    Ctrl-C is left to it, and SIGTERM is passed on."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        env=program_environment(Machine()) | dict(environment or {}),
        cwd=folder,
        stderr=stderr,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_termination = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
        signal.signal(signal.SIGTERM, on_termination)
        if process.poll() is None:
            process.kill()
            process.wait()


def _failure(name: str, directory: Path, status: int, log: Path) -> Exception:
    try:
        error = json.loads((directory / "error.json").read_text())
    except (OSError, ValueError):
        error = {}
    if error.get("input"):
        return DiskFailure(error["message"]) if error.get("disk") else InputError(error["message"])
    cause = signal.Signals(-status).name if status < 0 else error.get("message") or f"exit status {status}"
    return StageFailed(f"{name.replace('_', '-')} failed: {cause.rstrip('.')}. Its log: {log}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder for a program; what it writes to artifact/ there becomes ``target`` when it has ended.

    Nothing is left of a program that fails. Raises InputError if ``target`` exists and is not empty.
    """
    check_new_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield folder
        try:
            os.rename(folder / "artifact", target)
        except OSError:
            check_new_folder(target)  # another process was first
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_new_folder(target: Path) -> None:
    """Refuse a place where something is already. Raises InputError."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} is a file: name a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"The folder {target} is not empty: name a new one")
