"""Start programs, and launchers with their ranks, as forks of a process that has imported torch and peft.

Their imports take longer than most tests. What `python ARGUMENTS` would run is run as there, in a process of
its own that can be killed; tests of a stage's start use the real thing (tests/tasks/test_launch.py).
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from tests.support.paths import ROOT

LAUNCHERS = ("torch.distributed.run", "accelerate.commands.launch")
PRELOADED = (
    "pyarrow.parquet",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
    *LAUNCHERS,
)
# read when the libraries are loaded, so that a test cannot change them for its program
FIXED = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "TORCHDYNAMO_DISABLE": "1",  # as stages start theirs without a GPU
}


class Forked:
    """A forked process with the part of Popen's interface that tests and torch's launcher use."""

    def __init__(self, process: BaseProcess) -> None:
        process.start()
        assert process.pid is not None
        self.process, self.pid = process, process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()


def start(arguments: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Forked:
    """Start what ``python ARGUMENTS`` runs, in the root of the project and with its output in ``log``.

    ``environment`` is added to that of this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    variables = {**os.environ, **(environment or {}), **FIXED}
    with mock.patch.dict(os.environ, FIXED):  # of the server, which starts with the first process
        return Forked(context.Process(target=_run_with, args=(arguments, log, variables)))


def _run_with(arguments: list[str], log: Path, variables: dict[str, str]) -> None:
    """Run in a fork of the server."""
    gc.freeze()  # no garbage collection scans the libraries' objects, nor copies their pages
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]  # programs end by os._exit
    os.close(output)
    if arguments[:1] == ["-m"] and arguments[1] in LAUNCHERS:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.SubprocessHandler._popen = _start_rank  # type: ignore[method-assign, assignment]
    run_python(arguments)


def run_python(arguments: list[str]) -> None:
    """Run a module ("-m", its name) or a script with arguments in this process, as ``python`` would."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _start_rank(handler: object, arguments: tuple[str, ...], variables: dict[str, str]) -> Forked:
    """Fork a rank from its launcher, which would spawn ``arguments``."""
    python, unbuffered, *rest = arguments
    assert (python, unbuffered) == (sys.executable, "-u"), arguments
    return Forked(multiprocessing.get_context("fork").Process(target=_run_rank, args=(rest, variables)))


def _run_rank(arguments: list[str], variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(variables)
    run_python(arguments)
