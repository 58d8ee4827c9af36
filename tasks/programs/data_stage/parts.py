"""Make the parts of the data stage on a standard executor, and keep them for a restarted program.

A part is one file or folder, made by a module-level function of a task that names it as ``output``. The
counts that the function returns are written beside it as JSON (``<output>.json``), last: a part whose counts
are there is not made again. A step whose parts are all made may leave a file that lists them (``done``), so
that its tasks need not be listed again.
"""

import itertools
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import TypeAdapter

from tasks.dataset.readers.blocks import Block
from tasks.programs.data_stage.code_digest import code_digest
from tasks.programs.runtime.program import PHASE_SECONDS, Run
from tasks.system.errors import StageFailed, refusing_disk_failures
from tasks.system.files import replacing

PartCounts = TypeVar("PartCounts")
RESUMES = "run it again, it goes on from the parts that are made"


class Task(Protocol):
    """The argument of a function that makes a part."""

    @property
    def output(self) -> Path:
        """The file or folder to be made."""


Make = Callable[[Any], Any]  # takes a Task, returns counts


class Parts(NamedTuple):
    """An executor for the parts of one run of the data stage."""

    executor: Executor
    max_pending: int  # parts that are submitted ahead, so that no worker is idle and memory stays flat
    digest: str = ""  # of the code that workers must have; "": they are processes of this one
    on_part: Callable[[str, Counter[str]], None] = lambda *_: None  # step, and parts made by each worker

    def make(self, function: Make, tasks: Iterable[Task], *, done: Path | None = None) -> Iterator[Path]:
        """Yield the output of every task, in the order of the tasks, once it is made.

        ``tasks`` is read only as fast as outputs are consumed. Once all are made, the file ``done`` lists
        them; if it is there, ``tasks`` is not read.
        """
        if done and done.exists():
            yield from read_outputs(done)
            return
        outputs, makers = [], Counter[str]()
        for output in self._make_in_order(function, iter(tasks)):
            makers[_read(output)["made_by"]] += 1
            self.on_part(function.__name__, makers)
            outputs.append(str(output))
            yield output
        if done:
            _write(done, json.dumps(outputs).encode())

    def _make_in_order(self, function: Make, tasks: Iterator[Task]) -> Iterator[Path]:
        first = list(itertools.islice(tasks, 2))
        if len(first) == 1:  # not worth the start of a process
            yield make_part(function, first[0])
            return
        pending: deque[Future[Path]] = deque()
        for task in itertools.chain(first, tasks):
            pending.append(self._submit(function, task))
            while pending and (len(pending) >= self.max_pending or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _submit(self, function: Make, task: Task) -> Future[Path]:
        if not counts_path(task.output).exists():
            return self.executor.submit(make_part, function, task, self.digest)
        made: Future[Path] = Future()
        made.set_result(task.output)
        return made


def make_part(function: Make, task: Task, digest: str = "") -> Path:
    """Make a part unless it is there, and return its path. Raises InputError and StageFailed."""
    if digest:
        _check_worker(task, digest)
    if not counts_path(task.output).exists():
        with refusing_disk_failures(task.output.parent):
            counts = function(task)
            record = {"made_by": f"{socket.gethostname()}:{os.getpid()}", "counts": counts}
            _write(counts_path(task.output), _adapter(dict[str, Any]).dump_json(record))
    return task.output


def _check_worker(task: Task, digest: str) -> None:
    machine = socket.gethostname()
    if code_digest() != digest:
        raise StageFailed(
            f"The worker on {machine} has other code, or other versions of libraries, than the process "
            "that sent the part: install the same on both"
        )
    folder, block = task.output.parent, getattr(task, "block", None)
    if not folder.is_dir():
        raise StageFailed(
            f"The worker on {machine} does not see {folder}: "
            "put ALIGNFLOW_HOME on a disk that all of them share"
        )
    if isinstance(block, Block) and block.is_in_file and not block.path.is_file():
        raise StageFailed(
            f"The worker on {machine} does not see {block.path}: "
            "put the source on a disk that all of them share"
        )


def report_makers(run: Run) -> Callable[[str, Counter[str]], None]:
    """Return a function that reports how many parts of a step each worker of a cluster has made."""
    last = 0.0

    def report(step: str, makers: Counter[str]) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PHASE_SECONDS:
            last = now
            by = ", ".join(f"{maker} {count}" for maker, count in sorted(makers.items()))
            run.log_phase(f"{step}: parts by {by}", makers.total())

    return report


def read_outputs(done: Path) -> list[Path]:
    """Return the parts that the file of a finished step lists."""
    return [Path(output) for output in json.loads(done.read_bytes())]


def counts_path(output: Path) -> Path:
    """Return the file of the counts of a part."""
    return output.with_name(f"{output.name}.json")


def read_counts(output: Path, kind: Callable[..., PartCounts]) -> PartCounts:
    """Return the counts of a part."""
    counts: PartCounts = _adapter(kind).validate_python(_read(output)["counts"])
    return counts


def _read(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(counts_path(output).read_bytes())
    return record


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as new:
        new.write_bytes(content)
