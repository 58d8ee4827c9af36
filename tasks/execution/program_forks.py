"""The fork server's other side: programs that start with torch, transformers and peft already loaded.

Their imports take 5 to 9 s of every program, more than some of them work. Linux and CPU only: a process that has touched a GPU must not be forked.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tasks.artifacts.code_version import PROGRAMS
from tasks.config.machine import Machine

SERVER = f"{PROGRAMS}.runtime.fork_server"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
PATIENCE = 10.0  # seconds for a server without work to end


class Child:
    """A program that a fork server runs; its end is asked for as a Popen's is."""

    def __init__(self, report: int) -> None:
        """Waits for {"pid"} on the pipe ``report``, where {"status", "peak_kb"} will follow; EOFError when the server is gone."""
        self.report, self.text = report, b""
        self.returncode: int | None = None
        self.peak_mb = 0.0  # known at its end
        self.pid: int = self._next()["pid"]
        os.set_blocking(report, False)

    def poll(self) -> int | None:
        """Its exit status once it has ended (negative for a signal), else None."""
        if self.returncode is None:
            try:
                end = self._next()
                self.returncode, self.peak_mb = end["status"], end["peak_kb"] / 1024
            except BlockingIOError:
                return None
            except EOFError:  # the server was killed: nobody looks after its programs
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.returncode = -signal.SIGKILL
            os.close(self.report)
        return self.returncode

    def _next(self) -> dict[str, int]:
        while b"\n" not in self.text:
            part = os.read(self.report, 4096)
            if not part:
                raise EOFError
            self.text += part
        line, _, self.text = self.text.partition(b"\n")
        told: dict[str, int] = json.loads(line)
        return told


class _Server:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", SERVER, str(theirs.fileno())],
                env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True, pass_fds=(theirs.fileno(),),
            )  # fmt: skip

    def start(self, stage: str, directory: Path, inherited: tuple[int, ...]) -> Child | None:
        request = json.dumps({"stage": stage, "directory": str(directory)}).encode()
        report, theirs = os.pipe()
        try:
            socket.send_fds(self.socket, [request], [theirs, *inherited])
        except OSError:
            os.close(report)
            return None
        finally:
            os.close(theirs)
        try:
            return Child(report)  # waits until the server has loaded its libraries
        except EOFError:
            os.close(report)
            return None

    def stop(self) -> None:
        self.socket.close()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_guard = threading.Lock()
_server: _Server | None = None


def warm_up(environment: dict[str, str], machine: Machine) -> bool:
    """See to a server with this environment, whose libraries load in the background; False where programs must not be forked."""
    global _server
    if sys.platform != "linux" or (machine.device != "cpu" and any(map(os.path.exists, GPU_DEVICES))):
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
    """Start a program, with ``inherited[0]`` as its stdout and stderr; None where there is no server or it has died: then start it the usual way."""
    with _guard:
        return None if _server is None else _server.start(stage, directory, inherited)


def stop() -> None:
    """End the server and whatever it runs."""
    global _server
    with _guard:
        if _server is not None:
            _server.stop()
        _server = None
