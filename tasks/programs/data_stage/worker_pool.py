"""Work spread over processes, its results in the order of the tasks, and noted, so that a program that is started again does not do them again.

The processes are this machine's own, or those that whoever started the program has elsewhere (away.py).
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
TASKS_PER_WORKER = 2  # tasks waiting per process, so that none is idle and memory stays flat


class WorkerPool:
    """As many processes as are told, started when there is work for more than one. ``notes`` is the folder of results, ``asks`` that of shards."""

    def __init__(self, processes: int, notes: Path | None = None, asks: Path | None = None) -> None:
        self.processes, self.notes, self.asks = processes, notes, asks
        self.pool: ProcessPoolExecutor | None = None
        self.shards = itertools.count()

    def map(
        self, do: Callable[[Task], Result], tasks: Iterable[Task], *, noted: bool = False
    ) -> Iterator[Result]:
        """``do(task)`` of every task, in their order. ``tasks`` is drawn from only as results are taken, and not at all once all are noted."""
        if noted and (known := self.noted(do)) is not None:
            yield from (read_cached(do, self._note(do, number)) for number in range(known))
            return
        calls = (
            Call(do, task, self._note(do, number) if noted else None) for number, task in enumerate(tasks)
        )
        count = 0
        for result in (
            remote_calls.run_remotely(calls, self.asks, self.shards) if self.asks else self._here(calls)
        ):
            count += 1
            yield result
        if noted:
            write_file(self._whole(do), str(count).encode())

    def noted(self, do: Function) -> int | None:
        """How many results there are, if all of them are noted."""
        return int(self._whole(do).read_text()) if self._whole(do).exists() else None

    def _note(self, do: Function, number: int) -> Path:
        assert self.notes
        return self.notes / f"{do.__name__}{number:06}.json"

    def _whole(self, do: Function) -> Path:
        assert self.notes
        return self.notes / f"{do.__name__}.all"

    def _here(self, calls: Iterator[Call]) -> Iterator[Any]:
        first = list(itertools.islice(calls, 2))
        if self.processes == 1 or len(first) < 2:
            yield from map(run_cached, itertools.chain(first, calls))
            return
        waiting: deque[Future[Any]] = deque()
        for call in itertools.chain(first, calls):
            waiting.append(self._begun(call))
            if len(waiting) >= TASKS_PER_WORKER * self.processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _begun(self, call: Call) -> Future[Any]:
        if call.is_noted:
            known: Future[Any] = Future()
            known.set_result(run_cached(call))
            return known
        self.pool = self.pool or ProcessPoolExecutor(
            self.processes, multiprocessing.get_context("spawn"), _exit_with_parent
        )
        return self.pool.submit(run_cached, call)


@contextmanager
def open_worker_pool(
    processes: int, notes: Path | None = None, asks: Path | None = None
) -> Iterator[WorkerPool]:
    """A crew that is gone in the end; 0 processes: one for every core that this process may use."""
    found = WorkerPool(processes or _count_cores(), notes, asks)
    try:
        yield found
    finally:
        if found.pool:
            found.pool.shutdown(cancel_futures=True)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _exit_with_parent() -> None:
    """A process whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
