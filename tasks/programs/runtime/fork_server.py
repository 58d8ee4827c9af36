"""Spares programs their imports: loads the libraries once, then forks itself for every program that is asked for.

python -m tasks.programs.runtime.fork_server DESCRIPTOR        a connected UNIX socket that keeps message boundaries

A request is {"stage", "directory"} with file descriptors: where to report, the program's log, and any that the program shall inherit. The report is
a line {"pid"} and, at the program's end, a line {"status" (negative for a signal), "peak_kb"}. When the socket's other end closes, all is killed.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import NoReturn

# Libraries only, and none that computes when it is imported: alignflow's own modules are read anew by each program, as its version says.
PRELOADED = (
    "pyarrow.parquet",
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "peft",
)
MAX_DESCRIPTORS = 16


def serve(requests: socket.socket) -> None:
    """Fork a program for every request until the other end closes."""
    reports: dict[int, int] = {}  # pid of a running program -> where its end is reported
    wake, waker = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(waker)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([requests.fileno(), wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _reap(reports)
        if requests.fileno() in ready:
            message, descriptors, _, _ = socket.recv_fds(requests, 65536, MAX_DESCRIPTORS)
            if not message:
                break
            report, log, *_ = descriptors
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                requests.close()
                for inner in (wake, waker, report, *reports.values()):
                    os.close(inner)
                _become(**json.loads(message), log=log)
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            reports[pid] = report
            _tell(report, pid=pid)
    for pid in reports:
        os.killpg(pid, signal.SIGKILL)


def _reap(reports: dict[int, int]) -> None:
    while reports:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if not pid:
            return
        report = reports.pop(pid)
        _tell(report, status=os.waitstatus_to_exitcode(status), peak_kb=usage.ru_maxrss)
        os.close(report)


def _tell(report: int, **line: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody wants to know any more
        os.write(report, (json.dumps(line) + "\n").encode())


def _name(text: str) -> None:
    """What process lists show."""
    Path("/proc/self/comm").write_text(text[:15])


def _become(*, stage: str, directory: str, log: int) -> NoReturn:
    """Run a program in this forked process as ``python -m`` would."""
    status = 1
    try:
        os.setsid()
        _name(stage)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(directory)
        sys.argv = [f"{stage}.py", directory]
        runpy.run_module(f"tasks.programs.{stage}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        with contextlib.suppress(OSError):  # the log may be on a full disk
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # what is loaded stays: children need neither look through it nor copy it
    _name("forkserver")
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
