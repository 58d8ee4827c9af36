"""Run tasks in worker processes, with results in the order of the tasks and cached on disk.

A restarted program reads cached results and does not run those tasks again. The workers are processes of this
machine, or of other machines if the program was started with a folder for requests (remote_calls.py).
"""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tasks.programs.data_stage import remote_calls
from tasks.programs.data_stage.cached_call import Call, Function, read_cached, run_cached, write_file

Task = TypeVar("Task")
Result = TypeVar("Result")
TASKS_PER_WORKER = 2  # tasks in the queue per process, so that none is idle and memory stays flat


class WorkerPool:
    """A pool of processes, started when there is more than one task.

    ``results`` is the folder of cached results, ``requests`` the folder of requests to other machines.
    """

    def __init__(self, processes: int, results: Path | None = None, requests: Path | None = None) -> None:
        self.processes, self.results, self.requests = processes, results, requests
        self.pool: ProcessPoolExecutor | None = None
        self.request_numbers = itertools.count()

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], *, cached: bool = False
    ) -> Iterator[Result]:
        """Yield ``function(task)`` of every task, in their order; with ``cached`` results are kept on disk.

        ``tasks`` is read only as fast as results are consumed, and not at all if all results are cached.
        """
        if cached and (count := self.num_cached(function)) is not None:
            yield from (read_cached(function, self._result_path(function, n)) for n in range(count))
            return
        calls = (
            Call(function, task, self._result_path(function, number) if cached else None)
            for number, task in enumerate(tasks)
        )
        results = self._run_locally(calls)
        if self.requests:
            results = remote_calls.run_remotely(calls, self.requests, self.request_numbers)
        count = 0
        for result in results:
            count += 1
            yield result
        if cached:
            write_file(self._count_path(function), str(count).encode())

    def num_cached(self, function: Function) -> int | None:
        """Return the number of results if all of them are cached, else None."""
        path = self._count_path(function)
        return int(path.read_text()) if path.exists() else None

    def _result_path(self, function: Function, number: int) -> Path:
        assert self.results
        return self.results / f"{function.__name__}{number:06}.json"

    def _count_path(self, function: Function) -> Path:
        assert self.results
        return self.results / f"{function.__name__}.all"

    def _run_locally(self, calls: Iterator[Call]) -> Iterator[Any]:
        first = list(itertools.islice(calls, 2))
        if self.processes == 1 or len(first) < 2:
            yield from map(run_cached, itertools.chain(first, calls))
            return
        waiting: deque[Future[Any]] = deque()
        for call in itertools.chain(first, calls):
            waiting.append(self._submit(call))
            if len(waiting) >= TASKS_PER_WORKER * self.processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _submit(self, call: Call) -> Future[Any]:
        if call.is_cached:
            done: Future[Any] = Future()
            done.set_result(run_cached(call))
            return done
        self.pool = self.pool or ProcessPoolExecutor(
            self.processes, multiprocessing.get_context("spawn"), _exit_with_parent
        )
        return self.pool.submit(run_cached, call)


@contextmanager
def open_worker_pool(
    processes: int, results: Path | None = None, requests: Path | None = None
) -> Iterator[WorkerPool]:
    """Yield a worker pool and shut it down at the end. 0 processes: one for every core that may be used."""
    workers = WorkerPool(processes or _count_cores(), results, requests)
    try:
        yield workers
    finally:
        if workers.pool:
            workers.pool.shutdown(cancel_futures=True)


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
