"""Test the fork server: programs start without their imports, and nothing outlives the process that asked
for it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.config.machine import Machine
from tasks.execution import program_environment, program_forks
from tasks.execution.launch import run_program
from tasks.system.errors import StageFailed
from tests.support import fake_programs
from tests.support.fake_programs import is_alive, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")

WHO = "import json, os, sys\nfrom pathlib import Path\n"
WHO += (
    "Path('who.json').write_text(json.dumps([os.getppid(), os.getpid(), os.getpgid(0), sys.argv, "
    "os.environ.get('OMP_NUM_THREADS')]))\n"
)
WHO += "Path('done').write_text('')\nprint('I ran')\n"
HANGS = (
    "import os, time\nopen('pid.new', 'w').write(str(os.getpid()))\nos.rename('pid.new', 'pid')\n"
    "time.sleep(600)\nimport torch\n"
)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    monkeypatch.setattr(program_environment, "GPU_DEVICES", ())
    yield made
    program_forks.stop()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    (made / "job.json").write_text('{"job": {}}')
    return made


def write(tree: Path, code: str, stage: str = "sft") -> None:
    (tree / "tasks" / "programs" / f"{stage}.py").write_text(code)


def who(directory: Path) -> list:
    return json.loads((directory / "who.json").read_text())


def test_programs_are_children_of_one_server_and_leaders_of_their_own_group(
    tree: Path, directory: Path
) -> None:
    write(tree, WHO)
    run_program("sft", directory, Machine(threads=3))
    parent, pid, group, arguments, threads = who(directory)
    assert parent not in (os.getpid(), 1)
    assert pid == group
    assert arguments == [str(tree / "tasks" / "programs" / "sft.py"), str(directory)]
    assert threads == "3"
    assert (directory / "log.txt").read_text() == "I ran\n"
    run_program("sft", directory, Machine(threads=3))
    assert who(directory)[0] == parent
    assert who(directory)[1] != pid


def test_another_environment_gets_another_server(tree: Path, directory: Path) -> None:
    write(tree, WHO)
    run_program("sft", directory, Machine(threads=1))
    first = who(directory)[0]
    run_program("sft", directory, Machine(threads=2))
    assert who(directory)[0] != first
    assert who(directory)[4] == "2"
    wait_until(lambda: not is_alive(first))


def test_a_program_is_the_code_of_its_own_start_not_of_the_servers(tree: Path, directory: Path) -> None:
    material = tree / "tasks" / "rlhf" / "word.py"
    material.write_text("WORD = 'old'\n")
    write(
        tree,
        (
            "from pathlib import Path\nfrom tasks.rlhf.word import WORD\nPath('word').write_text(WORD)\n"
            "Path('done').write_text('')\n"
        ),
    )
    run_program("sft", directory, Machine())
    assert (directory / "word").read_text() == "old"
    material.write_text("WORD = 'newer'\n")
    run_program("sft", directory, Machine())
    assert (directory / "word").read_text() == "newer"


def test_a_program_that_needs_no_torch_is_our_own_child(tree: Path, directory: Path) -> None:
    write(tree, WHO, "report")
    run_program("report", directory, Machine())
    assert who(directory)[0] == os.getpid()


@pytest.mark.parametrize("cause", ["gpu", "broken"])
def test_where_there_can_be_no_server_programs_start_the_usual_way(
    tree: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    write(tree, WHO)
    if cause == "gpu":
        monkeypatch.setattr(program_environment, "GPU_DEVICES", (os.devnull,))
    else:
        (tree / "tasks" / "programs" / "runtime" / "fork_server.py").write_text("import no_such_library\n")
    run_program("sft", directory, Machine())
    assert who(directory)[0] == os.getpid()


def test_a_machine_told_to_use_its_cpu_forks_though_it_has_a_gpu(
    tree: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_environment, "GPU_DEVICES", (os.devnull,))
    write(tree, WHO)
    run_program("sft", directory, Machine(device="cpu"))
    assert who(directory)[0] != os.getpid()
    run_program(
        "sft", directory, Machine()
    )  # the server is still there, but not for a program that may use the GPU
    assert who(directory)[0] == os.getpid()


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('no such thing')", 1, "no such thing\n"),
        ("import os; os.kill(os.getpid(), 15)", -15, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_every_end_has_the_status_that_an_interpreter_would_give(
    tree: Path, directory: Path, code: str, status: int, text: str
) -> None:
    write(tree, code + "\n")
    program_forks.warm_up(program_environment.program_environment(Machine()), Machine())
    with (directory / "log.txt").open("ab") as log:
        child = program_forks.start("sft", directory, (log.fileno(),))
    assert child is not None
    wait_until(lambda: child.poll() is not None)
    assert child.poll() == status
    assert (directory / "log.txt").read_text().endswith(text)


def test_a_program_keeps_what_it_inherits_open(tree: Path, directory: Path) -> None:
    write(tree, "import time\ntime.sleep(1.5)\n")
    reader, writer = os.pipe()
    program_forks.warm_up(program_environment.program_environment(Machine()), Machine())
    with (directory / "log.txt").open("ab") as log:
        child = program_forks.start("sft", directory, (log.fileno(), writer))
    os.close(writer)
    assert child is not None
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):  # still open at the program's side
        os.read(reader, 1)
    wait_until(lambda: child.poll() is not None)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_a_killed_server_takes_its_program_along_and_the_next_program_gets_a_new_one(
    tree: Path, directory: Path
) -> None:
    write(tree, HANGS)

    def kill_the_server() -> int:
        wait_until((directory / "pid").exists)
        pid = int((directory / "pid").read_text())
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(parent, signal.SIGKILL)
        return pid

    program_forks.warm_up(program_environment.program_environment(Machine()), Machine())
    with (directory / "log.txt").open("ab") as log:
        child = program_forks.start("sft", directory, (log.fileno(),))
    assert child is not None
    pid = kill_the_server()
    wait_until(lambda: child.poll() is not None)
    assert child.poll() == -signal.SIGKILL
    wait_until(lambda: not is_alive(pid))
    write(tree, WHO)
    run_program("sft", directory, Machine())
    assert who(directory)[0] != os.getpid()


def test_a_failure_under_the_server_names_its_cause(tree: Path, directory: Path) -> None:
    write(tree, "import os; os.kill(os.getpid(), 9)\n")
    with pytest.raises(StageFailed, match=r"killed by SIGKILL\. Its log"):
        run_program("sft", directory, Machine())


def test_server_and_program_die_with_whoever_asked_even_on_kill_9(tree: Path, directory: Path) -> None:
    write(tree, HANGS)
    code = (
        "import sys; from pathlib import Path; from tasks.execution import launch, program_environment; from "
        "tasks.config.machine import Machine\n"
    )
    code += "program_environment.GPU_DEVICES = ()\nlaunch.run_program('sft', Path(sys.argv[1]), Machine())"
    parent = subprocess.Popen([sys.executable, "-c", code, str(directory)], cwd=tree)
    wait_until((directory / "pid").exists)
    pid = int((directory / "pid").read_text())
    server = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    assert server != parent.pid
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(pid) and not is_alive(server))
