"""One program as a child process: started, followed through its metrics.jsonl, and never left running."""

import json
import math
import os
import re
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tasks.artifacts.code_version import PROGRAMS, ROOT, imported_packages
from tasks.config.machine import Machine
from tasks.execution import program_forks
from tasks.system.errors import DiskFailure, InputError, StageCrashed, StageFailed, probe_disk
from tasks.system.processes import die_with_parent

Line = dict[str, Any]

POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL

# Programs get their inputs as files: no library may look anything up, report anything or draw a bar into the log.
QUIET = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Programs read files of strangers, and talk to no server: nothing in their environment opens one. A proxy's address may hold a password.
SECRET = re.compile(
    r"^(PREFECT|MLFLOW|AWS|AZURE|GOOGLE|PG|WANDB|DATABRICKS|KUBE)"
    r"|^ALIGNFLOW_(DATABASE|ALERT_WEBHOOK|ENGINE)$"
    r"|PROXY$|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|SIGNING_?KEY|WEBHOOK|COOKIE|JWT|CONNECTION_STRING"
    r"|_(DSN|PWD|PAT|KEY)$",
    re.IGNORECASE,
)
NOT_SECRET = {"TOKENIZERS_PARALLELISM"}
LOGIN = re.compile(r"://[^/@\s]*:[^/@\s]+@")  # an address with a password in it, under whatever name
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Threads wait for each other by spinning this often and then sleep. On a quiet machine that is as fast as OpenMP's own choice; beside other work,
# which OpenMP expects to be alone with, a training step was more than twice as fast.
SPIN = "10000"
BEFORE_TRAINING = (
    "site",
    "data",
)  # when one of these is made anew, programs that need torch come next: it loads meanwhile


interrupted = (
    threading.Event()
)  # Ctrl-C was pressed; the exception that it raised may have ended in a library that catches everything


class Usage(NamedTuple):
    seconds: float
    peak_mb: float  # most resident memory, 2**20 bytes


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, Ctrl-C ends the program at work even when whatever code it hits upon swallows KeyboardInterrupt."""

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
    on_poll: Callable[[], None] = lambda: None,
    keep_open: tuple[int, ...] = (),
) -> Usage:
    """Run ``tasks.programs.<stage>`` on ``directory`` to its end.

    Raises InputError when the input is the user's to mend, StageFailed for anything else. Whatever else is raised meanwhile (Ctrl-C, say), the
    program is killed first. ``on_poll`` is called again and again meanwhile; ``keep_open`` are file descriptors that the program inherits.
    """
    for name in ("done", "error.json"):
        (directory / name).unlink(missing_ok=True)
    started = time.monotonic()
    with (directory / "log.txt").open("ab") as log:
        process = _start(stage, directory, machine, (log.fileno(), *keep_open))
        try:
            among = _with_children if _are_several(stage, machine) else _itself
            status, peak_mb = _follow(process, directory / "metrics.jsonl", on_step, on_poll, among)
        except BaseException:
            _kill(process)
            raise
    if status != 0 or not (directory / "done").exists():
        if status > 0 and not (directory / "error.json").exists() and (failure := probe_disk(directory)):
            raise failure  # the reason could not even be written down
        if status == 1 and _are_several(stage, machine) and not (directory / "error.json").exists():
            status = -signal.SIGKILL  # torchrun's own word for whatever ended them; what ends otherwise than killed has written down why
        raise _failure(stage, directory, status)
    return Usage(time.monotonic() - started, peak_mb)


def warm_up(stage: str, machine: Machine) -> None:
    """Let a fork server load its libraries while whoever will start the stage's program is still busy with something else."""
    if "torch" in imported_packages(stage) and not _are_several(stage, machine):
        program_forks.warm_up(environment(machine), machine)


def _start(
    stage: str, directory: Path, machine: Machine, inherited: tuple[int, ...]
) -> "subprocess.Popen[bytes] | program_forks.Child":
    """The program as a child of a fork server that has torch loaded, where it needs torch and there can be such a server; else as our own."""
    chosen = environment(machine)
    if _are_several(stage, machine):
        return _spawn(
            _several(stage, directory, machine),
            directory,
            _shared(chosen, machine.of(stage).processes),
            inherited,
        )
    needs_torch = "torch" in imported_packages(stage)
    forkable = (needs_torch or stage in BEFORE_TRAINING) and program_forks.warm_up(chosen, machine)
    if needs_torch and forkable and (child := program_forks.start(stage, directory, inherited)) is not None:
        return child
    return _spawn([f"{PROGRAMS}.{stage}", str(directory)], directory, chosen, inherited)


def _spawn(
    module: list[str], directory: Path, chosen: dict[str, str], inherited: tuple[int, ...]
) -> "subprocess.Popen[bytes]":
    """``python -m`` in ``directory``, its output to the first of the descriptors that it inherits."""
    return subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=directory, env=chosen, stdin=subprocess.DEVNULL, stdout=inherited[0], stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid()), pass_fds=inherited,
    )  # fmt: skip


def _are_several(stage: str, machine: Machine) -> bool:
    return machine.of(stage).processes * machine.of(stage).nodes > 1


def _several(stage: str, directory: Path, machine: Machine) -> list[str]:
    """torchrun and its arguments: an agent that starts the program's processes, and ends them all when one has failed."""
    launch = machine.of(stage)
    meeting = ["--standalone"]
    if launch.nodes > 1:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", machine.rendezvous, "--rdzv-id", directory.name]
        meeting = ["--nnodes", str(launch.nodes), *where]
    return [
        "torch.distributed.run",
        *meeting,
        "--nproc-per-node",
        str(launch.processes),
        "-m",
        f"{PROGRAMS}.{stage}",
        str(directory),
    ]


def _shared(chosen: dict[str, str], processes: int) -> dict[str, str]:
    """The environment of one of several processes: together they have as many threads as cores, unless somebody has said how many each has."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **chosen}


def environment(machine: Machine) -> dict[str, str]:
    """The environment of a program."""
    chosen = {"GOMP_SPINCOUNT": SPIN, **without_secrets(os.environ), **QUIET}
    for name in OF_A_RANK:  # of whoever started us: a program is one of several only where we start several
        chosen.pop(name, None)
    if machine.threads:
        chosen["OMP_NUM_THREADS"] = str(machine.threads)
    if (
        str(ROOT) not in site.getsitepackages()
    ):  # a source tree: the program must be the one whose code is in the key
        chosen["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return chosen


def without_secrets(names: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what opens servers, databases or accounts."""
    return {
        name: value
        for name, value in names.items()
        if name in NOT_SECRET or not (SECRET.search(name) or LOGIN.search(value))
    }


def _follow(
    process: "subprocess.Popen[bytes] | program_forks.Child",
    metrics: Path,
    on_step: Callable[[Line], None],
    on_poll: Callable[[], None],
    among: Callable[[int], list[int]],
) -> tuple[int, float]:
    """Wait for the end; hand on every line of ``metrics`` as it comes. Gives the exit status and the peak memory in MB of those ``among`` names."""
    tail, peak_mb = Tail(metrics), 0.0
    while True:
        peak_mb = max(peak_mb, sum(map(_resident_peak_mb, among(process.pid))))
        status, fallback_mb = _ended(process)
        for line in tail.read():
            on_step(line)
        on_poll()
        if interrupted.is_set():
            raise KeyboardInterrupt
        if status is not None:
            return status, peak_mb or fallback_mb
        time.sleep(POLL_SECONDS)


def _ended(process: "subprocess.Popen[bytes] | program_forks.Child") -> tuple[int | None, float]:
    """Exit status, if it has one, and the peak memory in MB that the kernel tells of an ended child: it starts at its parent's size."""
    if isinstance(process, program_forks.Child):
        return process.poll(), process.peak_mb
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return None, 0.0
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _itself(pid: int) -> list[int]:
    return [pid]


def _with_children(pid: int) -> list[int]:
    """A process and those that it started itself."""
    try:
        return [
            pid,
            *(
                int(child)
                for path in Path(f"/proc/{pid}/task").glob("*/children")
                for child in path.read_text().split()
            ),
        ]
    except OSError:
        return [pid]


def _resident_peak_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    return next((int(row.split()[1]) / 1024 for row in status.splitlines() if row.startswith("VmHWM:")), 0.0)


class Tail:
    """New lines of a metrics.jsonl that grows, and that a resumed program replaces by a shorter one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.inode, self.offset = 0, 0
        self.seen: set[tuple[Any, ...]] = set()

    def read(self) -> list[Line]:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self.inode or stat.st_size < self.offset:
                    self.inode, self.offset = stat.st_ino, 0
                file.seek(self.offset)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [line for line in map(_parsed, whole.splitlines()) if line and self._is_new(line)]

    def _is_new(self, line: Line) -> bool:
        if "phase" in line:  # a resumed program does not keep them, and the same phase may come again
            return True
        mark = (line.get("step"), *sorted(line))
        fresh = mark not in self.seen
        self.seen.add(mark)
        return fresh


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:  # half a line that a killed program left, with the next one's text behind it
        return None
    return line if isinstance(line, dict) else None


def _kill(process: "subprocess.Popen[bytes] | program_forks.Child") -> None:
    """End the program and everything it started."""
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
    """Return the name of the library whose import ended a program before it began, "" for another end."""
    rows = log.read_text(errors="replace").splitlines()
    found = re.fullmatch(r"ModuleNotFoundError: No module named '([\w.]+)'", rows[-1]) if rows else None
    name = found[1].partition(".")[0] if found else ""
    return "" if name in ("tasks", "flows") else name


def _failure(stage: str, directory: Path, status: int) -> Exception:
    try:
        error = json.loads((directory / "error.json").read_text())
    except (OSError, ValueError):
        error = {}
    log = directory / "log.txt"
    if error.get("input"):
        return DiskFailure(error["message"]) if error.get("disk") else InputError(error["message"])
    if status == 2 and not error:  # error.json could not be written; meanwhile there is room again
        rows = log.read_text(errors="replace").splitlines() or [f"{stage} refused its input; see {log}"]
        return DiskFailure(rows[-1])
    if status == 1 and not error and (module := _missing_module(log)):
        return InputError(
            f"The stage {stage} needs {module}, not installed where it runs: pip install 'alignflow[train]' there"
        )
    if status < 0:
        cause = f"killed by {signal.Signals(-status).name}"
    else:
        cause = error.get("message") or f"exit status {status}" + ("" if status else " but not marked done")
    kind = StageCrashed if status < 0 else StageFailed
    return kind(f"The stage {stage} failed: {cause.rstrip('.')}. Its log: {log}")
