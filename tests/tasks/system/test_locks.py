"""Locks: one holder at a time, freed when it ends, and kept by a child that inherited the descriptor."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tasks.system.locks import acquire, is_held, try_acquire
from tests.support.fake_programs import wait_until

HOLDER = (
    "import sys, time; from pathlib import Path; from tasks.system.locks import acquire\n"
    "file = acquire(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "locks" / "a.lock"


def test_a_lock_excludes_others_until_its_file_is_closed(path: Path) -> None:
    assert not is_held(path)
    with acquire(path):
        assert is_held(path)
        assert try_acquire(path) is None
    assert not is_held(path)
    lock = try_acquire(path)
    assert lock is not None
    lock.close()


def test_a_thread_waits_for_another_and_says_so_once(path: Path) -> None:
    waits: list[str] = []
    order: list[str] = []

    def second() -> None:
        with acquire(path, on_wait=lambda: waits.append("wait")):
            order.append("second")

    with acquire(path):
        thread = threading.Thread(target=second)
        thread.start()
        wait_until(lambda: bool(waits))
        order.append("first")
    thread.join(10)
    assert (waits, order) == (["wait"], ["first", "second"])


def test_a_killed_holder_frees_its_lock(path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    assert is_held(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert not is_held(path)


def test_a_child_with_the_descriptor_holds_the_lock_after_its_parent_let_go(path: Path) -> None:
    with acquire(path) as lock:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[lock.fileno()])
    assert try_acquire(path) is None
    child.kill()
    child.wait()
    assert not is_held(path)


def test_a_lock_file_that_its_holder_removes_is_locked_by_its_new_name(path: Path) -> None:
    """Without that, the one who waited would hold a file that nobody else can open."""
    waiting, held = threading.Event(), threading.Event()
    ended = threading.Event()

    def second() -> None:
        with acquire(path, on_wait=waiting.set):
            held.set()
            ended.wait(900)

    with acquire(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(900)
        path.unlink()
    assert held.wait(900)
    assert is_held(path)
    assert os.path.exists(path)
    ended.set()
    thread.join(10)
