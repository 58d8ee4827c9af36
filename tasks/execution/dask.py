"""Run shards of the data stage as Prefect's mapped tasks on a Dask cluster.

The stage's program stays on this machine and writes requests for shards into a folder
(tasks/programs/data_stage/remote_calls.py); this process maps them over the cluster. Its workers need the
same code and the same disk.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prefect import task, unmapped
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from tasks.artifacts.code_version import PROGRAMS, source_digests
from tasks.config.machine import Machine
from tasks.execution.program_environment import program_environment
from tasks.system import events
from tasks.system.errors import DiskFailure, InputError, StageFailed
from tasks.system.files import replace_text
from tasks.system.hashing import digest_of
from tasks.system.processes import die_with_parent

SHARDED = ("data",)  # stages whose programs request shards
Poll = Callable[[], None]  # submits new requests and answers those that are done


def _task_run_name() -> str:
    what, _, number = Path(task_run.parameters["ask"]).stem.partition(" ")
    return f"{what} {int(number)}"


@task(name="shard", task_run_name=_task_run_name, persist_result=False, cache_policy=NO_CACHE)
def run(ask: str, version: str) -> str:
    """Run the calls of a request on this machine and return their results as JSON.

    Raises InputError (DiskFailure for a full disk) and StageFailed.
    """
    machine = os.uname().nodename
    if version != _version():
        raise StageFailed(
            f"The Dask worker on {machine} has other code than the process that sent the request: "
            "install the same version on both"
        )
    if not Path(ask).exists():
        raise StageFailed(
            f"The Dask worker on {machine} does not see {ask}: "
            "put ALIGNFLOW_HOME on a disk that all of them share"
        )
    done = subprocess.run(
        [sys.executable, "-m", f"{PROGRAMS}.data_stage.shard", ask],
        env=program_environment(Machine(threads=1)), stdin=subprocess.DEVNULL,
        capture_output=True, encoding="utf-8", errors="replace",
        preexec_fn=partial(die_with_parent, os.getpid()), check=False, start_new_session=True,
    )  # fmt: skip
    if done.returncode == 2 and done.stdout:
        error = json.loads(done.stdout)
        raise InputError(error["error"]) if error["kind"] == "input" else DiskFailure(error["error"])
    if done.returncode < 0:
        raise StageFailed(
            f"A shard on {machine} was killed by {signal.Signals(-done.returncode).name}: "
            "give its Dask worker more memory"
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it wrote no message"]
        raise StageFailed(f"A shard failed on {machine}: {lines[-1]}")
    return done.stdout


def _version() -> str:
    return digest_of(source_digests("data_stage.shard"))


@contextmanager
def sharing_work(stage: str, directory: Path, machine: Machine) -> Iterator[Poll]:
    """While the block runs, let the Dask cluster do what the program in ``directory`` requests, if there is a
    cluster.

    Yields the function to call again and again meanwhile. Raises InputError.
    """
    asks = directory / "asks"
    shutil.rmtree(asks, ignore_errors=True)
    if not machine.dask or stage not in SHARDED:
        yield lambda: None
        return
    with _cluster(machine.dask) as runner:
        asks.mkdir()
        if not runner.client.scheduler_info()["workers"]:
            events.tell(
                "warning",
                stage,
                text=f"{stage}: the Dask scheduler {machine.dask} has no workers yet; "
                "start some with `dask worker`",
            )
        try:
            yield _Requests(runner, asks).poll
        finally:
            shutil.rmtree(asks, ignore_errors=True)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    try:
        from prefect_dask import DaskTaskRunner
    except ImportError:
        raise InputError(
            "machine.dask needs the package prefect-dask: pip install 'alignflow[dask]'"
        ) from None
    if not address.rpartition(":")[2].isdigit():  # Dask reports that only after a minute, if at all
        raise InputError(
            f"machine.dask: there is no Dask scheduler at {address} (give it as tcp://host:port)"
        )
    with DaskTaskRunner(address=address) as runner:
        try:
            _ = runner.client
        except (
            OSError,
            ValueError,
            TypeError,
            AssertionError,
        ) as error:  # the last two: tls:// without settings
            why = str(error) or type(error).__name__
            raise InputError(f"machine.dask: there is no Dask scheduler at {address} ({why})") from None
        yield runner


class _Requests:
    """The requests of one program, and the futures of those that run."""

    def __init__(self, runner: Any, folder: Path) -> None:
        self.runner, self.folder, self.version = runner, folder, _version()
        self.known: set[Path] = set()
        self.running: dict[Path, Any] = {}

    def poll(self) -> None:
        if new := sorted(set(self.folder.glob("*.json")) - self.known):
            futures = self.runner.map(
                run, {"ask": [str(path) for path in new], "version": unmapped(self.version)}
            )
            self.known.update(new)
            self.running.update(zip(new, futures, strict=True))
        for path, future in list(self.running.items()):
            if future.wrapped_future.done():
                replace_text(path.with_suffix(".done"), _answer(future))
                del self.running[path]


def _answer(future: Any) -> str:
    try:
        results: str = future.result()
        return results
    except Exception as error:
        kind = (
            "disk"
            if isinstance(error, DiskFailure)
            else "input"
            if isinstance(error, InputError)
            else "other"
        )
        return json.dumps({"error": str(error) or type(error).__name__, "kind": kind})
