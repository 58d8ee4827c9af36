"""Open the executor that makes the parts of the data stage: this process, a pool, Dask or Ray."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from tasks.programs.data_stage.parts import RESUMES, Parts
from tasks.programs.runtime.program import Run
from tasks.system.errors import StageFailed

PENDING_PER_PROCESS = 2


@contextmanager
def open_parts(run: Run) -> Iterator[Parts]:
    """Yield what makes parts, as ``machine.dask``, ``ray`` and ``threads`` say. Raises InputError."""
    if run.machine.dask:
        from tasks.programs.data_stage import dask_cluster  # slow to import, and seldom used

        with dask_cluster.open_cluster(run.machine.dask, run) as parts:
            yield parts
        return
    if run.machine.ray:
        from tasks.programs.data_stage import ray_cluster

        with ray_cluster.open_cluster(run.machine.ray, run) as parts:
            yield parts
        return
    processes = run.machine.threads or _count_cores()
    if processes == 1:
        yield Parts(_ThisProcess(), max_pending=1)
        return
    with _open_pool(processes) as executor:
        yield Parts(executor, max_pending=PENDING_PER_PROCESS * processes)


class _ThisProcess(Executor):
    """An executor that makes each call at once, in the process and thread that submits it."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _open_pool(processes: int) -> Iterator[Executor]:
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, _exit_with_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise StageFailed(
            "One of the processes of the data stage was killed, perhaps because memory ran out: "
            f"set a lower machine.threads and {RESUMES}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_with_parent() -> None:
    """Exit when the parent process ends: a worker whose parent was killed would wait for tasks forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_exit() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_exit, daemon=True).start()
