"""Start programs as forks of a process that has torch, transformers and peft loaded.

Their imports take 5 to 9 s, longer than some programs work. Linux and CPU only: a process that has touched a
GPU must not be forked.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from socket import socket

from tasks.artifacts.code_version import PROGRAMS, program_module
from tasks.config.machine import Machine
from tasks.execution.program_environment import may_use_gpu
from tasks.system.fork_server import kill_group, send_request, start_server

SERVER = f"{PROGRAMS}.runtime.fork_server"
STOP_SECONDS = 10.0  # for a server without programs to end


class Child:
    """A forked program, with the part of Popen's interface that callers need.

    It is killed when its connection closes.
    """

    def __init__(self, connection: socket) -> None:
        """Wait until the server has loaded its libraries and forked. Raises EOFError if it dies meanwhile."""
        self.connection = connection
        self.returncode: int | None = None
        self.peak_mb = 0.0  # known at its end
        self.pid: int = self._receive()["pid"]
        connection.setblocking(False)

    def poll(self) -> int | None:
        """Return its exit status once it has ended (negative for a signal), else None."""
        if self.returncode is None:
            try:
                end = self._receive()
                self.returncode, self.peak_mb = end["status"], end["peak_kb"] / 1024
            except BlockingIOError:
                return None
            except (
                EOFError
            ):  # the server was killed, and the program with it; what the program started is in its group
                kill_group(self.pid)
                self.returncode = -signal.SIGKILL
            self.connection.close()
        return self.returncode

    def _receive(self) -> dict[str, int]:
        try:
            message = self.connection.recv(4096)
        except ConnectionResetError:
            message = b""
        if not message:
            raise EOFError
        report: dict[str, int] = json.loads(message)
        return report


class _Server:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process, self.address, self.owner = start_server(SERVER, environment, subprocess.DEVNULL)

    def start(self, stage: str, directory: Path, inherited: tuple[int, ...]) -> Child | None:
        content = {"stage": stage, "module": program_module(stage), "directory": str(directory)}
        try:
            connection = send_request(self.address, content, inherited)
        except OSError:  # the server has died
            return None
        try:
            return Child(connection)
        except EOFError:
            connection.close()
            return None

    def stop(self) -> None:
        os.close(self.owner)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(
            self.address.parent, ignore_errors=True
        )  # the server does so itself, unless it was killed


_guard = threading.Lock()
_server: _Server | None = None


def warm_up(environment: dict[str, str], machine: Machine) -> bool:
    """Start a server with this environment unless it runs already; it loads its libraries in the background.

    Returns False on a machine whose programs must not be forked.
    """
    global _server
    if may_use_gpu(machine):
        return False
    with _guard:
        if _server is not None and _server.environment == environment and _server.process.poll() is None:
            return True
        if _server is None:
            atexit.register(stop)
        else:
            _server.stop()
        _server = _Server(environment)
    return True


def start(stage: str, directory: Path, inherited: tuple[int, ...]) -> Child | None:
    """Start a program that writes to ``inherited[0]``. Returns None without a server, or if it has died."""
    with _guard:
        return None if _server is None else _server.start(stage, directory, inherited)


def stop() -> None:
    """Stop the server and the programs that it still runs."""
    global _server
    with _guard:
        if _server is not None:
            _server.stop()
        _server = None
