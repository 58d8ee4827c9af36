"""Test shards of the data stage on a Dask cluster: a real scheduler and two workers; other stages are
fakes.
"""

import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from distributed import Client

from flows.services.processes import free_port
from tasks.dataset import sorted_files
from tasks.dataset.readers.blocks import Block, write_content
from tasks.dataset.readers.user_names import read_user_names
from tasks.execution import dask
from tasks.programs.data_stage import remote_calls
from tasks.programs.data_stage import shard as program
from tasks.programs.data_stage.cached_call import Call, run_cached
from tasks.system.errors import DiskFailure, InputError, StageFailed
from tests.support import fake_programs
from tests.support.data_sets import write_noisy_posts
from tests.support.fake_programs import wait_until
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

# so that a small dump has many blocks, ranges and shards
SMALLER = {
    "dataset/readers/blocks.py": ("BLOCK_BYTES = 2**24", "BLOCK_BYTES = 2**17"),
    "programs/data.py": ("PARTITION_RECORDS = 2**14", "PARTITION_RECORDS = 2**10"),
    "programs/data_stage/remote_calls.py": ("CALLS_PER_REQUEST = 8", "CALLS_PER_REQUEST = 2"),
}


AFTERWARDS = "These posts hold no question with two answers."  # of the stage behind the data stage


class Cluster(NamedTuple):
    address: str
    scheduler: "subprocess.Popen[bytes]"
    workers: list["subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a source tree with the real data stage."""
    made = fake_programs.make_tree(tmp_path_factory.mktemp("shards") / "tree")
    shutil.copy(ROOT / "tasks" / "programs" / "data.py", made / "tasks" / "programs" / "data.py")
    for name, (before, after) in SMALLER.items():
        path = made / "tasks" / name
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    fake_programs.misbehave(made, "pretrain", "input")  # what comes after the data stage would only take time
    return made


@pytest.fixture
def cluster(tree: Path, tmp_path: Path) -> Iterator[Cluster]:
    address = f"tcp://127.0.0.1:{free_port()}"
    environment = fake_programs.environment(tree, tmp_path / "elsewhere") | {"PREFECT_LOGGING_LEVEL": "ERROR"}

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


def task_runs(home: Path) -> dict[str, str]:
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        return dict(database.execute("select name, state_type from task_run"))


def test_two_workers_make_the_same_bytes_as_one_machine(
    tree: Path, posts: Path, alone: str, cluster: Cluster, tmp_path: Path
) -> None:
    _, _, error = fake_programs.run_cli(tree, tmp_path / "home", "run", *profile(posts, cluster.address))
    assert AFTERWARDS in error
    assert manifest(tmp_path / "home")["digest"] == alone
    with Client(cluster.address, set_as_default=False) as client:
        assert min(client.run(lambda dask_worker: dask_worker.state.executed_count).values()) > 1
    runs = task_runs(tmp_path / "home")
    assert {state for name, state in runs.items() if name == "data" or " " in name} == {"COMPLETED"}
    for do in ("read_block", "filter_partition", "build_table_part"):
        assert sum(name.startswith(f"{do} ") for name in runs) > 2
    assert not list((tmp_path / "home" / "partial").glob("*/checkpoints/work"))


def test_a_worker_that_is_lost_takes_nothing_with_it(
    tree: Path, posts: Path, alone: str, cluster: Cluster, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    process = fake_programs.start_cli(tree, home, "run", *profile(posts, cluster.address))
    wait_until(lambda: list(home.glob("partial/*/checkpoints/work/results/read_block*.json")), 60)
    os.killpg(cluster.workers[0].pid, signal.SIGKILL)
    _, error = process.communicate(timeout=180)
    assert AFTERWARDS in error
    assert manifest(home)["digest"] == alone


def test_what_a_shard_refuses_is_refused_in_its_words(
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
def test_an_address_that_dask_cannot_use_is_the_users_to_mend(address: str, why: str) -> None:
    with (
        pytest.raises(InputError, match=f"machine.dask: there is no Dask scheduler at {address} .*({why})"),
        dask._cluster(address),
    ):
        pass


def run_on_cluster(folder: Path, numbers: Iterator[int], num_cached: int = 0) -> tuple[str, int]:
    """Run calls for three blocks of users, a thread as cluster; return the request's name and task count."""
    folder.mkdir(exist_ok=True)
    blocks = [
        Block(folder / "Users.xml", "Users.xml", "xml", f'<row Id="{k}" DisplayName="User {k}"/>'.encode(), 0)
        for k in range(3)
    ]
    calls = [
        Call(read_user_names, write_content(block, folder / f"{k}.block"), folder / f"{k}.cached")
        for k, block in enumerate(blocks)
    ]
    for call in calls[:num_cached]:
        run_cached(call)
    found: list[tuple[str, int]] = []

    def serve() -> None:
        (request,) = wait_until(lambda: list(folder.glob("*.json")))
        found.append((request.name, len(json.loads(request.read_text())["tasks"])))
        request.with_suffix(".done").write_bytes(program.run_request(request))

    server = threading.Thread(target=serve)
    server.start()
    assert list(remote_calls.run_remotely(iter(calls), folder, numbers)) == [
        [(k, f"User {k}")] for k in range(3)
    ]
    server.join()
    assert not list(folder.glob("*.json")) + list(folder.glob("*.done"))
    return found[0]


def test_requests_have_different_names_and_leave_out_cached_calls(tmp_path: Path) -> None:
    numbers = itertools.count()
    assert run_on_cluster(tmp_path / "a", numbers) == (
        "read_user_names 000000.json",
        3,
    )  # the flow ignores a name that it has seen before
    assert run_on_cluster(tmp_path / "b", numbers, num_cached=2) == ("read_user_names 000001.json", 1)


def test_what_two_do_at_once_is_whole(tmp_path: Path) -> None:
    records = [(k, "x" * 200) for k in range(2_000)]
    path = tmp_path / "records.jsonl"
    sorted_files.write(list(records), path)
    ended = threading.Event()

    def again() -> None:
        while not ended.is_set():
            sorted_files.write(list(records), path)

    other = threading.Thread(target=again)
    other.start()
    try:
        for _ in range(30):
            (slices,) = sorted_files.partition([path], 10**6)
            assert len(list(sorted_files.read(slices))) == len(records)
    finally:
        ended.set()
        other.join()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["records.jsonl", "records.npy"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AssertionError, match="shorter than its index says"):
        list(sorted_files.read(slices))


def test_a_full_disk_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Runner:
        def map(self, _: Any, parameters: dict[str, Any]) -> list[Any]:
            def result() -> str:
                raise DiskFailure("the disk is full")

            return [
                SimpleNamespace(wrapped_future=SimpleNamespace(done=lambda: True), result=result)
                for _ in parameters["ask"]
            ]

    (tmp_path / "take 000000.json").write_text("{}")
    watch = dask._Requests(Runner(), tmp_path)
    watch.poll()
    with pytest.raises(DiskFailure, match="disk is full"):
        remote_calls._wait_for_results(tmp_path / "take 000000.done")


def test_a_worker_refuses_other_code_and_a_disk_that_it_does_not_share(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="has other code than the process that sent the request"):
        dask.run.fn(str(tmp_path / "take 000000.json"), "other")
    with pytest.raises(
        StageFailed,
        match=r"does not see .*take 000000.json: put ALIGNFLOW_HOME on a disk that all of them share",
    ):
        dask.run.fn(str(tmp_path / "take 000000.json"), dask._version())
