"""Work spread over processes, its results in the order of the tasks; what is one task only is done here."""

import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
AHEAD = 2  # tasks waiting per process, so that none is idle and memory stays flat


class Crew:
    """As many processes as are told, started when there is work for more than one."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.pool: ProcessPoolExecutor | None = None

    def map(self, do: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """``do(task)`` of every task, in their order. ``tasks`` is drawn from only as results are taken."""
        coming = iter(tasks)
        first = list(itertools.islice(coming, 2))
        if self.processes == 1 or len(first) < 2:
            yield from map(do, itertools.chain(first, coming))
            return
        self.pool = self.pool or ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"), _leave_with_parent)
        waiting: deque[Future[Result]] = deque()
        for task in itertools.chain(first, coming):
            waiting.append(self.pool.submit(do, task))
            if len(waiting) >= AHEAD * self.processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def crew(processes: int) -> Iterator[Crew]:
    """A crew that is gone in the end; 0 processes: one for every core that this process may use."""
    found = Crew(processes or _cores())
    try:
        yield found
    finally:
        if found.pool:
            found.pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_with_parent() -> None:
    """A process whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()
