"""Test the data stage on a Dask cluster: a real scheduler and two workers; other stages are fakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from distributed import Client

from flows.services.processes import free_port
from tasks.programs.data_stage import dask_cluster
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError
from tests.support import fake_programs
from tests.support.data_sets import write_noisy_posts
from tests.support.fake_programs import wait_until
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

# so that a small dump has many blocks and ranges
SMALLER = {
    "dataset/readers/blocks.py": ("BLOCK_BYTES = 2**24", "BLOCK_BYTES = 2**17"),
    "programs/data.py": ("PARTITION_RECORDS = 2**14", "PARTITION_RECORDS = 2**10"),
}


KILLED_PARTS = """
import os, signal, sys
from pathlib import Path
from typing import NamedTuple
from tasks.programs.data_stage.dask_cluster import open_cluster
from tasks.programs.runtime.program import Run
from tasks.system.errors import StageFailed

class Task(NamedTuple):
    output: Path

def kill(task):
    if task.output.name == "a":
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    from tasks.programs.killed_parts import Task, kill
    try:
        with open_cluster(sys.argv[1], Run(Path(sys.argv[2]))) as parts:
            list(parts.make(kill, [Task(Path(sys.argv[2], name)) for name in "ab"]))
    except StageFailed as error:
        print(error)
"""
AFTERWARDS = "These posts hold no question with two answers."  # of the stage behind the data stage


class Cluster(NamedTuple):
    address: str
    scheduler: "subprocess.Popen[bytes]"
    workers: list["subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a source tree with the real data stage."""
    made = fake_programs.make_tree(tmp_path_factory.mktemp("parts") / "tree")
    shutil.copy(ROOT / "tasks" / "programs" / "data.py", made / "tasks" / "programs" / "data.py")
    for name, (before, after) in SMALLER.items():
        path = made / "tasks" / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    (made / "tasks" / "programs" / "killed_parts.py").write_text(KILLED_PARTS)
    fake_programs.misbehave(made, "pretrain", "input")  # what comes after the data stage would only take time
    return made


@pytest.fixture
def cluster(tree: Path, tmp_path: Path) -> Iterator[Cluster]:
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = fake_programs.environment(tree, tmp_path / "elsewhere")
    environment |= {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        with (tmp_path / "dask.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2])
    workers = [
        start(
            "worker",
            address,
            "--nthreads",
            "1",
            "--no-nanny",
            "--local-directory",
            str(tmp_path / f"worker{k}"),
        )
        for k in range(2)
    ]
    try:
        with Client(address, timeout=300, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=300)
        yield Cluster(address, scheduler, workers)
    finally:
        for process in (*workers, scheduler):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def posts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_noisy_posts(tmp_path_factory.mktemp("posts") / "Posts.xml", 1_500)


@pytest.fixture(scope="module")
def alone(tree: Path, posts: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the digest of the data artifact that one machine makes."""
    home = tmp_path_factory.mktemp("alone") / "home"
    _, _, error = fake_programs.run_cli(tree, home, "run", *profile(posts))
    assert AFTERWARDS in error
    return str(manifest(home)["digest"])


def profile(posts: Path, address: str = "") -> list[str]:
    settings = {
        "source.kind": "stack-exchange",
        "source.path": str(posts),
        "method": "ppo",
        "machine.dask": address,
    }
    return ["demo", *(text for name, value in settings.items() for text in ("--set", f"{name}={value}"))]


def manifest(home: Path) -> dict[str, Any]:
    (found,) = (home / "objects" / "data").glob("*/manifest.json")
    return dict(json.loads(found.read_text()))


def test_two_workers_make_the_same_bytes_as_one_machine(
    tree: Path, posts: Path, alone: str, cluster: Cluster, tmp_path: Path
) -> None:
    _, _, error = fake_programs.run_cli(tree, tmp_path / "home", "run", *profile(posts, cluster.address))
    assert AFTERWARDS in error
    assert manifest(tmp_path / "home")["digest"] == alone
    with Client(cluster.address, set_as_default=False) as client:
        assert min(client.run(lambda dask_worker: dask_worker.state.executed_count).values()) > 1
    assert not list((tmp_path / "home" / "partial").glob("*/checkpoints/work"))


def test_a_worker_that_is_lost_takes_nothing_with_it(
    tree: Path, posts: Path, alone: str, cluster: Cluster, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    process = fake_programs.start_cli(tree, home, "run", *profile(posts, cluster.address))
    wait_until(lambda: list(home.glob("partial/*/checkpoints/work/records*.json")), 60)
    os.killpg(cluster.workers[0].pid, signal.SIGKILL)
    _, error = process.communicate(timeout=180)
    assert AFTERWARDS in error
    assert manifest(home)["digest"] == alone


def test_what_a_worker_refuses_is_refused_in_its_words(
    tree: Path, posts: Path, cluster: Cluster, tmp_path: Path
) -> None:
    rows = posts.read_text().splitlines()
    rows[-100] = "<other />"
    (tmp_path / "Posts.xml").write_text("\n".join(rows))
    status, _, error = fake_programs.run_cli(
        tree, tmp_path / "home", "run", *profile(tmp_path / "Posts.xml", cluster.address)
    )
    assert status == 2
    assert "Posts.xml is XML but not a Posts.xml" in error
    assert not list((tmp_path / "home" / "partial").iterdir())


def test_a_cluster_that_is_not_there_is_the_users_to_mend(
    tree: Path, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    address = f"tcp://127.0.0.1:{free_port()}"
    status, _, error = fake_programs.run_cli(tree, tmp_path / "home", "run", *profile(posts, address))
    assert status == 2, error
    assert f"machine.dask: there is no Dask scheduler at {address}" in error


@pytest.mark.parametrize(
    ("address", "why"),
    [("tls://127.0.0.1:9", r"tls|TLS|security"), ("tcp://127.0.0.1", "give it as tcp://host:port")],
)
def test_an_address_that_dask_cannot_use_is_the_users_to_mend(address: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"job": {}, "inputs": {}}))
    run = Run(tmp_path)
    with (
        pytest.raises(InputError, match=f"machine.dask: there is no Dask scheduler at {address} .*({why})"),
        dask_cluster.open_cluster(address, run),
    ):
        pass


def test_a_part_that_kills_its_workers_is_reported_in_one_sentence(
    tree: Path, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"job": {}, "inputs": {}}))
    command = [sys.executable, "-m", "tasks.programs.killed_parts", cluster.address, str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=fake_programs.environment(tree, tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "A part was killed on 2 Dask workers, the last one tcp://" in done.stdout, done.stderr
    assert "run it again, it goes on from the parts that are made" in done.stdout


def test_the_parts_of_each_worker_are_in_the_lines_of_progress(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"job": {}, "inputs": {}}))
    dask_cluster._reporter(Run(tmp_path))("read_block", Counter({"b:2": 1, "a:1": 3}))
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], line["step"]) == ("read_block: parts by a:1 3, b:2 1", 4)
