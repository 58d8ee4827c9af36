"""The fork server by itself: what it reports, inherits and kills, and when it ends."""

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.system.fork_server import ServerProcess, send_request, start_server
from tests.support.fake_programs import is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")

SERVER = """
import os, sys, time
from tasks.system import fork_server
request = fork_server.serve((), "test-forks")
if request is not None:
    os.write(request.descriptors[0], b"open")
    time.sleep(request.content["seconds"])
    os._exit(request.content["status"])
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    (tmp_path / "sleeper_forks.py").write_text(SERVER)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    started = start_server("sleeper_forks", {**os.environ, "PYTHONPATH": path}, None)
    yield started
    os.close(started.owner)
    started.process.kill()
    started.process.wait()
    shutil.rmtree(started.address.parent, ignore_errors=True)


def request(server: ServerProcess, seconds: float, status: int = 0) -> tuple[socket.socket, int]:
    """Return the connection and the pid of a child that sleeps, once it runs."""
    reader, writer = os.pipe()
    connection = send_request(server.address, {"seconds": seconds, "status": status}, [writer])
    pid = json.loads(connection.recv(4096))["pid"]
    assert os.read(reader, 10) == b"open"
    os.close(reader)
    os.close(writer)
    return connection, int(pid)


def accepts(server: ServerProcess) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        return connection.connect_ex(str(server.address)) == 0


def test_a_child_reports_its_pid_and_at_its_end_status_and_memory(server: ServerProcess) -> None:
    assert server.address.parent.stat().st_mode & 0o077 == 0
    connection, pid = request(server, 0, status=7)
    with connection:
        report = json.loads(connection.recv(4096))
        assert report["status"] == 7
        assert report["peak_kb"] > 1000
        assert connection.recv(4096) == b""
    connection, pid = request(server, 600)
    with connection:
        os.kill(pid, signal.SIGTERM)
        assert json.loads(connection.recv(4096))["status"] == -signal.SIGTERM


def test_a_child_is_killed_when_its_client_closes_and_others_go_on(server: ServerProcess) -> None:
    first, first_pid = request(server, 600)
    second, second_pid = request(server, 600)
    with second:
        first.close()
        wait_until(lambda: not is_alive(first_pid))
        assert is_alive(second_pid)


def test_a_client_that_dies_before_it_reads_the_pid_does_not_end_the_server(server: ServerProcess) -> None:
    other, pid = request(server, 600)
    reader, writer = os.pipe()
    connection = send_request(server.address, {"seconds": 600, "status": 0}, [writer])
    assert os.read(reader, 10) == b"open"
    time.sleep(0.2)  # the pid has been sent and is still unread: closing the socket resets the connection
    connection.close()
    os.close(writer)
    assert os.read(reader, 10) == b"", "its child is killed"
    os.close(reader)
    third, _ = request(server, 600)
    with other, third:
        assert is_alive(pid)


def test_children_die_with_a_killed_server(server: ServerProcess) -> None:
    connection, pid = request(server, 600)
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not is_alive(pid))
    with connection:
        assert connection.recv(4096) == b""
    with pytest.raises(ConnectionRefusedError):
        send_request(server.address, {}, [])


def test_the_server_ends_once_its_owner_is_gone_and_its_last_child_has_ended(server: ServerProcess) -> None:
    connection, pid = request(server, 600)
    with open(os.devnull) as null:
        os.dup2(null.fileno(), server.owner)  # closes the pipe; the fixture closes the descriptor
    wait_until(lambda: not accepts(server))
    with connection:
        assert is_alive(pid)
    assert server.process.wait(900) == 0
    assert not is_alive(pid)
    assert not server.address.parent.exists()
