"""Start processes as forks of one that has their libraries loaded: the server, and what its clients share.

A server listens on a UNIX socket that keeps message boundaries. A connection is one child: the client sends a
JSON object and file descriptors, and receives {"pid"} and, when the child has ended, {"status", "peak_kb"};
the status is negative for a signal. If the client closes its connection first, the child and its process
group are killed. If the server dies, the kernel kills its children. The server ends when its owner has closed
a pipe and no child is left.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from tasks.system.processes import die_with_parent

MAX_BYTES = 2**20
MAX_DESCRIPTORS = 16
BACKLOG = 64


class Request(NamedTuple):
    """What a client sent: it is carried out by the child."""

    content: dict[str, Any]
    descriptors: list[int]


class ServerProcess(NamedTuple):
    """A server as its owner sees it."""

    process: "subprocess.Popen[bytes]"
    address: Path  # of its socket, in a folder that only this user can open
    owner: int  # a descriptor; the server ends when it is closed


def start_server(
    module: str, environment: Mapping[str, str], output: IO[bytes] | int | None
) -> ServerProcess:
    """Start ``python -m module``, which calls ``serve``.

    Clients may connect at once: they wait for its imports.
    """
    address = Path(tempfile.mkdtemp(prefix="alignflow-")) / "socket"
    read_end, owner = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(address))
        listener.listen(BACKLOG)
        inherited = (listener.fileno(), read_end)
        process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, inherited)],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=inherited,
            start_new_session=True,
        )
    os.close(read_end)
    return ServerProcess(process, address, owner)


def send_request(
    address: Path | str, content: Mapping[str, Any], descriptors: Iterable[int]
) -> socket.socket:
    """Return the connection of a new child. Raises OSError if there is no server."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(address))
        socket.send_fds(connection, [json.dumps(content).encode()], list(descriptors))
    except OSError:
        connection.close()
        raise
    return connection


def serve(preloaded: Iterable[str], title: str) -> Request | None:
    """Load libraries, then fork for every request.

    Returns the request in the child; None in the server at its end.
    """
    listener, owner = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    folder = Path(listener.getsockname()).parent
    for module in preloaded:
        importlib.import_module(module)
    gc.freeze()  # children need neither scan the libraries' objects nor copy their pages
    set_process_title(title)
    request = ForkServer(listener, owner).run()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
    return request


def set_process_title(title: str) -> None:
    """Set the name that process lists show."""
    Path("/proc/self/comm").write_text(title[:15])


class ForkServer:
    """The children of one server and their connections."""

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self.listener, self.owner = listener, owner
        self.connections: set[socket.socket] = set()
        self.children: dict[int, socket.socket] = {}  # pid -> connection
        self.wake_read, self.wake_write = os.pipe2(os.O_NONBLOCK)

    def run(self) -> Request | None:
        """Fork for every request. Returns it in the child; None once the owner and all children are gone."""
        signal.set_wakeup_fd(self.wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        is_owned = True
        while is_owned or self.connections:
            sources: list[socket.socket | int] = [self.wake_read, *self.connections]
            if is_owned:
                sources += [self.listener, self.owner]
            ready = select.select(sources, [], [])[0]
            if self.wake_read in ready:
                os.read(self.wake_read, 4096)
                self._reap()
            if self.owner in ready:
                is_owned = False
                self.listener.close()
            elif self.listener in ready:
                self.connections.add(self.listener.accept()[0])
            for connection in self.connections.intersection(ready):
                request = self._receive(connection)
                if request is not None:
                    return request
        return None

    def _receive(self, connection: socket.socket) -> Request | None:
        """Fork for a request and return it in the child; drop a connection that its client has closed."""
        try:
            message, descriptors, _, _ = socket.recv_fds(connection, MAX_BYTES, MAX_DESCRIPTORS)
        except ConnectionResetError:  # the client died before it read the pid
            message, descriptors = b"", []
        if not message:
            self._drop(connection)
            return None
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with_parent(server)
            os.setsid()
            self._close_inherited()
            return Request(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self.children[pid] = connection
        _report(connection, pid=pid)
        return None

    def _drop(self, connection: socket.socket) -> None:
        """Kill the child of a connection that its client has closed."""
        self.connections.remove(connection)
        connection.close()
        for pid, other in self.children.items():
            if other is connection:
                kill_group(pid)

    def _reap(self) -> None:
        """Collect the children that have ended, and report their status and peak memory."""
        while self.children:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
            if not pid:
                return
            connection = self.children.pop(pid)
            if connection in self.connections:
                _report(connection, status=os.waitstatus_to_exitcode(status), peak_kb=usage.ru_maxrss)
                self.connections.remove(connection)
                connection.close()

    def _close_inherited(self) -> None:
        """Close the server's descriptors in a child, and handle signals as usual."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for connection in (self.listener, *self.connections):
            connection.close()
        for descriptor in (self.owner, self.wake_read, self.wake_write):
            os.close(descriptor)


def _report(connection: socket.socket, **numbers: int) -> None:
    with contextlib.suppress(OSError):  # the client has closed it; the next select finds that
        connection.send(json.dumps(numbers).encode())


def kill_group(pid: int) -> None:
    """Kill a child and all processes of its group."""
    for kill in (os.killpg, os.kill):  # a child that has just been forked leads no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)
