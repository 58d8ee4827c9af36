"""Test the data stage on clusters of Dask and Ray: real ones, of two workers; other stages are fakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from distributed import Client

from flows.services.processes import free_port
from tasks.programs.data_stage import dask_cluster
from tasks.programs.data_stage import ray_cluster as stage_on_ray
from tasks.programs.data_stage.parts import report_makers
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


PARTS = """
import importlib, json, os, signal, sys, time
from pathlib import Path
from typing import NamedTuple
from tasks.programs.runtime.program import Run
from tasks.system.errors import StageFailed

class Task(NamedTuple):
    output: Path

def make(task):
    if task.output.name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.2)

if __name__ == "__main__":
    from tasks.programs.made_parts import Task, make
    cluster = importlib.import_module(f"tasks.programs.data_stage.{sys.argv[1]}_cluster")
    folder = Path(sys.argv[3])
    try:
        with cluster.open_cluster(sys.argv[2], Run(folder)) as parts:
            made = list(parts.make(make, [Task(folder / name) for name in sys.argv[4:]]))
        print(*{json.loads(part.with_name(f"{part.name}.json").read_text())["made_by"] for part in made})
    except StageFailed as error:
        print(error)
"""
AFTERWARDS = "These posts hold no question with two answers."  # of the stage behind the data stage


class Cluster(NamedTuple):
    kind: str  # its setting of `machine`
    address: str
    kill_worker: Callable[[], None]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a source tree with the real data stage."""
    made = fake_programs.make_tree(tmp_path_factory.mktemp("parts") / "tree")
    shutil.copy(ROOT / "tasks" / "programs" / "data.py", made / "tasks" / "programs" / "data.py")
    for name, (before, after) in SMALLER.items():
        path = made / "tasks" / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    (made / "tasks" / "programs" / "made_parts.py").write_text(PARTS)
    fake_programs.misbehave(made, "pretrain", "input")  # what comes after the data stage would only take time
    return made


@pytest.fixture(params=["dask", "ray"])
def cluster(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Iterator[Cluster]:
    if request.param == "ray":
        yield request.getfixturevalue("ray_cluster")
        return
    with start_dask(fake_programs.environment(tree, tmp_path / "elsewhere"), tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def ray_cluster(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Start a cluster that replaces workers which are killed."""
    folder = tmp_path_factory.mktemp("ray")
    with start_ray(fake_programs.environment(tree, folder / "elsewhere"), folder) as started:
        yield started


@contextmanager
def start_dask(environment: dict[str, str], folder: Path) -> Iterator[Cluster]:
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = environment | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}

    def start(*arguments: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
        with (folder / "dask.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", address.rpartition(":")[2])
    options = ("--nthreads", "1", "--no-nanny", "--local-directory")
    workers = [start("worker", address, *options, str(folder / f"worker{k}")) for k in range(2)]
    try:
        with Client(address, timeout=900, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=900)
        yield Cluster("dask", address, lambda: os.killpg(workers[0].pid, signal.SIGKILL))
    finally:
        for process in (*workers, scheduler):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def start_ray(environment: dict[str, str], folder: Path) -> Iterator[Cluster]:
    """Start a head with two workers, in a folder with a short name, for its sockets."""
    environment = environment | {"RAY_raylet_start_wait_time_s": "300"}  # this machine may be busy
    port = str(free_port())
    short = tempfile.mkdtemp(prefix="ray-")
    options = ["--num-cpus=2", "--object-store-memory=100000000", "--include-dashboard=false"]
    command = ["ray.scripts.scripts", "start", "--head", "--block", f"--port={port}", f"--temp-dir={short}"]
    with (folder / "ray.log").open("ab") as output:
        head = subprocess.Popen(
            [sys.executable, "-m", *command, *options, "--disable-usage-stats"],
            cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

    def workers() -> list[psutil.Process]:
        found = [
            one for one in psutil.process_iter() if one.name() == "raylet" and short in str(one.cmdline())
        ]
        return [
            child for one in found for child in one.children() if child.name() in ("ray::_call", "ray::IDLE")
        ]

    try:
        log = folder / "ray.log"
        wait_until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None)
        assert head.poll() is None, log.read_text()
        yield Cluster("ray", f"127.0.0.1:{port}", lambda: workers()[0].kill())
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(short)


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


def profile(posts: Path, kind: str = "dask", address: str = "") -> list[str]:
    settings = {
        "source.kind": "stack-exchange",
        "source.path": str(posts),
        "method": "ppo",
        f"machine.{kind}": address,
    }
    return ["demo", *(text for name, value in settings.items() for text in ("--set", f"{name}={value}"))]


def manifest(home: Path) -> dict[str, Any]:
    (found,) = (home / "objects" / "data").glob("*/manifest.json")
    return dict(json.loads(found.read_text()))


def test_two_workers_make_the_same_bytes_as_one_machine(
    tree: Path, posts: Path, alone: str, cluster: Cluster, tmp_path: Path
) -> None:
    _, _, error = fake_programs.run_cli(
        tree, tmp_path / "home", "run", *profile(posts, cluster.kind, cluster.address)
    )
    assert AFTERWARDS in error
    assert manifest(tmp_path / "home")["digest"] == alone
    assert not list((tmp_path / "home" / "partial").glob("*/checkpoints/work"))


def test_a_worker_that_is_lost_takes_nothing_with_it(
    tree: Path, posts: Path, alone: str, cluster: Cluster, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    process = fake_programs.start_cli(tree, home, "run", *profile(posts, cluster.kind, cluster.address))
    wait_until(lambda: list(home.glob("partial/*/checkpoints/work/records*.json")))
    cluster.kill_worker()
    _, error = process.communicate(timeout=900)
    assert AFTERWARDS in error
    assert manifest(home)["digest"] == alone


def test_what_a_worker_refuses_is_refused_in_its_words(
    tree: Path, posts: Path, cluster: Cluster, tmp_path: Path
) -> None:
    rows = posts.read_text().splitlines()
    rows[-100] = "<other />"
    (tmp_path / "Posts.xml").write_text("\n".join(rows))
    status, _, error = fake_programs.run_cli(
        tree, tmp_path / "home", "run", *profile(tmp_path / "Posts.xml", cluster.kind, cluster.address)
    )
    assert status == 2
    assert "Posts.xml is XML but not a Posts.xml" in error
    assert not list((tmp_path / "home" / "partial").iterdir())


def test_a_cluster_that_is_not_there_is_the_users_to_mend(
    tree: Path, posts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT", "1s")
    address = f"tcp://127.0.0.1:{free_port()}"
    status, _, error = fake_programs.run_cli(tree, tmp_path / "home", "run", *profile(posts, "dask", address))
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


@pytest.mark.parametrize("address", ["127.0.0.1:PORT", "127.0.0.1", "host:port"])
def test_a_ray_cluster_that_is_not_there_is_the_users_to_mend(address: str, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"job": {}, "inputs": {}}))
    address = address.replace("PORT", str(free_port()))
    with (
        pytest.raises(
            InputError, match=rf"this machine belongs to no Ray cluster at {address} \(.+\): start"
        ),
        stage_on_ray.open_cluster(address, Run(tmp_path)),
    ):
        pass


def make_parts(tree: Path, cluster: Cluster, folder: Path, *names: str) -> str:
    """Make parts of these names by a program, and return what it says: their makers, or why it failed."""
    (folder / "job.json").write_text(json.dumps({"job": {}, "inputs": {}}))
    module = [sys.executable, "-m", "tasks.programs.made_parts"]
    done = subprocess.run(
        [*module, cluster.kind, cluster.address, str(folder), *names],
        cwd=folder, env=fake_programs.environment(tree, folder / "home"),
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    return done.stdout


def test_both_workers_make_parts(tree: Path, cluster: Cluster, tmp_path: Path) -> None:
    assert len(make_parts(tree, cluster, tmp_path, *map(str, range(20))).split()) == 2


def test_a_part_that_kills_its_workers_is_reported_in_one_sentence(
    tree: Path, cluster: Cluster, tmp_path: Path
) -> None:
    said = make_parts(tree, cluster, tmp_path, "kill", "other")
    killed = {"dask": "2 Dask workers, the last one tcp://", "ray": "4 Ray workers"}[cluster.kind]
    assert f"A part was killed on {killed}" in said
    assert "run it again, it goes on from the parts that are made" in said


def test_the_parts_of_each_worker_are_in_the_lines_of_progress(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"job": {}, "inputs": {}}))
    report_makers(Run(tmp_path))("read_block", Counter({"b:2": 1, "a:1": 3}))
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], line["step"]) == ("read_block: parts by a:1 3, b:2 1", 4)
