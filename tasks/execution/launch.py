"""Run a stage's program as a child process: start it, follow its metrics, and never leave it running."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tasks.artifacts.code_version import imported_packages, program_module
from tasks.config.machine import Launch, Machine
from tasks.execution import accelerate_config, program_forks
from tasks.execution.metrics_tail import Line, MetricsTail
from tasks.execution.program_environment import (
    distributed_environment,
    endpoint_variables,
    program_environment,
)
from tasks.system.errors import DiskFailure, InputError, StageCrashed, StageFailed, probe_disk
from tasks.system.processes import die_with_parent

Program = subprocess.Popen[bytes] | program_forks.Child

POLL_SECONDS = 0.05
ERROR = re.compile(r"(?:\[rank\d+\]: ?)?[\w.]*(?:Error|Exception): \S")  # the last line of a traceback
MOST_LETTERS = 400  # of an error in a log
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
BEFORE_TRAINING = (
    "site",
    "data",
)  # the fork server loads torch while one of these runs: stages that need it follow

# Set by Ctrl-C. KeyboardInterrupt alone is not enough: libraries that catch every exception swallow it.
interrupted = threading.Event()


class Usage(NamedTuple):
    """What a program used."""

    seconds: float
    peak_mb: float  # most resident memory, in 2**20 bytes


@contextmanager
def interruptible() -> Iterator[None]:
    """End the running program on Ctrl-C, even if the code that it interrupts swallows KeyboardInterrupt."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        signal.default_int_handler(number, frame)

    interrupted.clear()
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        interrupted.clear()


def run_program(
    stage: str,
    directory: Path,
    machine: Machine,
    *,
    on_step: Callable[[Line], None] = lambda _: None,
    keep_open: tuple[int, ...] = (),
) -> Usage:
    """Run the stage's program on ``directory`` to its end.

    Raises InputError if the user must change an input, StageFailed for any other failure. On any other
    exception, such as KeyboardInterrupt, the program is killed first. ``on_step`` is called with every new
    line of metrics.jsonl; the program inherits the file descriptors ``keep_open``.
    """
    for name in ("started", "done", "error.json"):
        (directory / name).unlink(missing_ok=True)
    started = time.monotonic()
    with (directory / "log.txt").open("ab") as log:
        process = _start(stage, directory, machine, (log.fileno(), *keep_open))
        try:
            members = _with_children if machine.of(stage).is_distributed else _alone
            status, peak_mb = _follow(process, directory / "metrics.jsonl", on_step, members)
        except BaseException:
            _kill(process)
            raise
    if status != 0 or not (directory / "done").exists():
        has_reason = (directory / "error.json").exists()
        if status > 0 and not has_reason and (failure := probe_disk(directory)):
            raise failure  # the disk refused even the file with the reason
        has_started = (directory / "started").exists()
        if status == 1 and machine.of(stage).is_distributed and has_started and not has_reason:
            status = -signal.SIGKILL  # a launcher's status for killed ranks; others have written a reason
        raise _failure(stage, directory, status)
    return Usage(time.monotonic() - started, peak_mb)


def warm_up(stage: str, machine: Machine) -> None:
    """Let the fork server load the stage's libraries while the caller prepares the stage."""
    if "torch" in imported_packages(stage) and not machine.of(stage).is_distributed:
        program_forks.warm_up(program_environment(machine), machine)


def _start(stage: str, directory: Path, machine: Machine, inherited: tuple[int, ...]) -> Program:
    """Fork the program from the server that has torch loaded, if it needs torch and there is one.

    Else spawn it.
    """
    secrets = endpoint_variables(_job(directory))
    launch = machine.of(stage)
    if launch.accelerate_config:
        settings = accelerate_config.read(stage, launch)
        environment = distributed_environment(machine, accelerate_config.processes_per_node(settings))
        return _spawn(_accelerate(stage, directory, launch), directory, environment | secrets, inherited)
    if launch.is_distributed:
        environment = distributed_environment(machine, launch.processes)
        return _spawn(_torchrun(stage, directory, machine), directory, environment | secrets, inherited)
    environment = program_environment(machine)
    if secrets:  # never in the fork server, which others share
        return _spawn([program_module(stage), str(directory)], directory, environment | secrets, inherited)
    needs_torch = "torch" in imported_packages(stage)
    forkable = (needs_torch or stage in BEFORE_TRAINING) and program_forks.warm_up(environment, machine)
    if needs_torch and forkable and (child := program_forks.start(stage, directory, inherited)) is not None:
        return child
    return _spawn([program_module(stage), str(directory)], directory, environment, inherited)


def _job(directory: Path) -> dict[str, Any]:
    """Return the settings of the stage's job."""
    job: dict[str, Any] = json.loads((directory / "job.json").read_text()).get("job", {})
    return job


def _spawn(
    module: list[str], directory: Path, environment: dict[str, str], inherited: tuple[int, ...]
) -> subprocess.Popen[bytes]:
    """Start ``python -m`` in ``directory``, with its output to the first inherited descriptor."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=directory, env=environment,
        stdin=subprocess.DEVNULL, stdout=inherited[0], stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid()), pass_fds=inherited,
    )  # fmt: skip


def _accelerate(stage: str, directory: Path, launch: Launch) -> list[str]:
    """Return accelerate's module and arguments: the user's configuration, except for the precision, which is
    in the key of an artifact.

    Raises InputError if the configuration is not there.
    """
    config = accelerate_config.find(stage, launch)
    set_elsewhere = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    program = ["-m", program_module(stage), str(directory)]
    return ["accelerate.commands.launch", "--config_file", str(config), *set_elsewhere, *program]


def _torchrun(stage: str, directory: Path, machine: Machine) -> list[str]:
    """Return torchrun's module and arguments.

    It starts the processes, and ends all of them when one fails.
    """
    launch = machine.of(stage)
    rendezvous = ["--standalone"]
    if launch.nodes > 1:
        endpoint = [
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            machine.rendezvous,
            "--rdzv-id",
            directory.name,
        ]
        rendezvous = ["--nnodes", str(launch.nodes), *endpoint]
    processes = ["--nproc-per-node", str(launch.processes)]
    return ["torch.distributed.run", *rendezvous, *processes, "-m", program_module(stage), str(directory)]


def _follow(
    process: Program,
    metrics: Path,
    on_step: Callable[[Line], None],
    members: Callable[[int], list[int]],
) -> tuple[int, float]:
    """Wait for the program's end and call ``on_step`` with every new line of ``metrics``.

    Return the exit status and the peak memory in MB, summed over the processes that ``members`` lists.
    """
    tail, peak_mb = MetricsTail(metrics), 0.0
    while True:
        peak_mb = max(peak_mb, sum(map(_resident_peak_mb, members(process.pid))))
        status, fallback_mb = _poll(process)
        for line in tail.read():
            on_step(line)
        if interrupted.is_set():
            raise KeyboardInterrupt
        if status is not None:
            return status, peak_mb or fallback_mb
        time.sleep(POLL_SECONDS)


def _poll(process: Program) -> tuple[int | None, float]:
    """Return the exit status (None while the program runs) and the peak memory in MB as the kernel counts it.

    The kernel counts from the size of the parent, so that figure is only a fallback.
    """
    if isinstance(process, program_forks.Child):
        return process.poll(), process.peak_mb
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return None, 0.0
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _alone(pid: int) -> list[int]:
    return [pid]


def _with_children(pid: int) -> list[int]:
    """Return a process and its direct children."""
    try:
        children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return [pid]
    return [pid, *(int(child) for of_thread in children for child in of_thread)]


def _resident_peak_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(row.split()[1]) / 1024 for row in status.splitlines() if row.startswith("VmHWM:")), 0.0)


def _kill(process: Program) -> None:
    """End the program and every process that it started."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, math.inf)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + patience
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    process.poll()


def _missing_module(log: Path) -> str:
    """Return the name of the library whose import ended the program at its start, "" for another failure."""
    rows = log.read_text(errors="replace").splitlines()
    pattern = r"(?:.*\()?ModuleNotFoundError: No module named '([\w.]+)'\)?"  # in brackets: of python -m
    found = re.fullmatch(pattern, rows[-1]) if rows else None
    name = found[1].partition(".")[0] if found else ""
    return "" if name in ("tasks", "flows") else name


def _last_error(log: Path) -> str:
    """Return the last error in a log, with the lines that follow it, or else the last line; "" if empty."""
    rows = [row for row in log.read_text(errors="replace").splitlines() if row.strip()]
    errors = [number for number, row in enumerate(rows) if ERROR.match(row)]
    return textwrap.shorten(" ".join(rows[errors[-1] if errors else -1 :]), MOST_LETTERS, placeholder=" ...")


def _failure(stage: str, directory: Path, status: int) -> Exception:
    """Return the exception for a program that ended with ``status``, as error.json or else its log says."""
    try:
        error = json.loads((directory / "error.json").read_text())
    except (OSError, ValueError):
        error = {}
    log = directory / "log.txt"
    if error.get("input"):
        return DiskFailure(error["message"]) if error.get("disk") else InputError(error["message"])
    if status == 2 and not error:  # error.json could not be written; by now there is room again
        rows = log.read_text(errors="replace").splitlines() or [f"{stage} refused its input; see {log}"]
        return DiskFailure(rows[-1])
    if status == 1 and not error and (module := _missing_module(log)):
        return InputError(
            f"The stage {stage} needs {module}, not installed where it runs: "
            "pip install 'alignflow[train]' there"
        )
    if status < 0:
        cause = f"killed by {signal.Signals(-status).name}"
    else:
        # a program says why it fails; a launcher that starts none, and an import that fails, only log it
        reason = error.get("message") or (_last_error(log) if status == 1 else "")
        cause = reason or f"exit status {status}" + ("" if status else " but not marked done")
    error_type = StageCrashed if status < 0 else StageFailed
    return error_type(f"The stage {stage} failed: {cause.rstrip('.')}. Its log: {log}")
