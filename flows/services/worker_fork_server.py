"""Spares flow runs their imports: has Prefect and MLflow loaded, and forks itself for every run that a worker starts.

python -m flows.services.worker_fork_server LISTENER OWNER     a listening UNIX socket that keeps message boundaries; a pipe that closes with the worker

A connection (flows.services.worker_fork_client) is one run: it sends {"environment", "directory"} with the descriptors of its output, and is told the run's pid and, at
its end, {"status"} (negative for a signal). When the connection closes first, the run is killed. Runs outlive their worker, and this process them.
"""

import atexit
import contextlib
import gc
import importlib
import json
import logging
import os
import runpy
import select
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tasks.system.processes import die_with_parent

# libraries only: alignflow's own modules are read anew by every run
PRELOADED = (
    "prefect.flow_engine",
    "prefect.task_engine",
    "prefect.deployments",
    "mlflow.tracking.client",
    "mlflow.store.tracking.rest_store",
)
MAX_BYTES = 2**20
STREAMS = 2  # standard output and error


class Request(NamedTuple):
    environment: dict[str, str]
    directory: str
    streams: list[int]


class Forks:
    """The runs of one worker."""

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self.listener, self.owner = listener, owner
        self.connections: set[socket.socket] = set()
        self.runs: dict[int, socket.socket] = {}
        self.wake, self.waker = os.pipe2(os.O_NONBLOCK)

    def serve(self) -> Request | None:
        """Fork at every request. Gives the request in the child that is to run it; None when the worker and all runs are gone."""
        signal.set_wakeup_fd(self.waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        is_owned = True
        while is_owned or self.connections:
            heard: list[Any] = [
                self.wake,
                *self.connections,
                *([self.listener, self.owner] if is_owned else []),
            ]
            ready = select.select(heard, [], [])[0]
            if self.wake in ready:
                os.read(self.wake, 4096)
                self._reap()
            if self.owner in ready:
                is_owned = False
                self.listener.close()
            elif self.listener in ready:
                self.connections.add(self.listener.accept()[0])
            for connection in self.connections.intersection(ready):
                if (request := self._hear(connection)) is not None:
                    return request
        return None

    def _hear(self, connection: socket.socket) -> Request | None:
        message, descriptors, _, _ = socket.recv_fds(connection, MAX_BYTES, STREAMS)
        if not message:
            self._drop(connection)
            return None
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            die_with_parent(parent)
            self._let_go()
            return Request(**json.loads(message), streams=descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self.runs[pid] = connection
        self._tell(connection, pid=pid)
        return None

    def _drop(self, connection: socket.socket) -> None:
        """Whoever wanted the run is gone: so is the run."""
        self.connections.remove(connection)
        connection.close()
        for pid, other in self.runs.items():
            if other is connection:
                os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self.runs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            connection = self.runs.pop(pid)
            if connection in self.connections:
                self._tell(connection, status=os.waitstatus_to_exitcode(status))
                self.connections.remove(connection)
                connection.close()

    def _let_go(self) -> None:
        """In a child: nothing of its parent's stays open."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for connection in (self.listener, *self.connections):
            connection.close()
        for descriptor in (self.owner, self.wake, self.waker):
            os.close(descriptor)

    @staticmethod
    def _tell(connection: socket.socket, **line: int) -> None:
        with contextlib.suppress(OSError):  # it has gone; _drop sees to the rest
            connection.send(json.dumps(line).encode())


def become(request: Request) -> None:
    """Be the process that Prefect would have started: ``python -m prefect.engine`` in that folder, with that environment."""
    os.setsid()
    logging.raiseExceptions = (
        False  # a log that cannot be written must not fill the worker's output with tracebacks
    )
    for stream, descriptor in enumerate(request.streams, start=1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(request.directory)
    if settings(request.environment) != settings(dict(os.environ)):  # Prefect has read its settings already
        os.execve(sys.executable, [sys.executable, "-m", "prefect.engine"], request.environment)
    os.environ.clear()
    os.environ.update(request.environment)
    name(f"flow {request.environment['PREFECT__FLOW_RUN_ID'][:8]}")
    sys.argv = ["prefect.engine"]
    sys.modules.pop("prefect.engine", None)  # it runs as __main__ now
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def settings(environment: dict[str, str]) -> dict[str, str]:
    """What the libraries that are loaded may have read when they were."""
    read = ("PREFECT_", "MLFLOW_", "PYTHON")
    return {
        key: value
        for key, value in environment.items()
        if key.startswith(read) and not key.startswith("PREFECT__")
    }


def name(text: str) -> None:
    """What process lists show."""
    Path("/proc/self/comm").write_text(text[:15])


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    folder = Path(listener.getsockname()).parent
    owner = int(sys.argv[2])
    atexit.register(
        gc.freeze
    )  # of the children as well: at their end they would look through all that is loaded, for a second
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # what is loaded stays: children need neither look through it nor copy it
    name("engine")
    request = Forks(listener, owner).serve()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        become(request)


if __name__ == "__main__":
    main()
