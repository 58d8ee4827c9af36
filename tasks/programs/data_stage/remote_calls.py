"""Run function calls on other machines: write requests to a folder and wait there for the results.

The flow that started the program has the requests done on a Dask cluster (tasks/execution/dask.py).

<name>.json   {"do": name of the function, "tasks": [...]}: a request, written by the program; shard.py does
              it on any machine that sees the same folders
<name>.done   {"results": [...]}, or {"error": sentence, "kind": "input", "disk" (it is full) or "other"}: the
              response, written by the flow
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.programs.data_stage.cached_call import Call, result_type, run_cached, task_type, write_file
from tasks.system.errors import DiskFailure, InputError

CALLS_PER_REQUEST = 8  # some seconds of work, against half a second to start its program
MAX_PENDING_REQUESTS = 32  # their blocks are on disk meanwhile
POLL_SECONDS = 0.02


class ShardFailed(RuntimeError):
    """A request that failed for another reason than the input."""


class Request(NamedTuple):
    """Calls that are run together on another machine."""

    calls: list[Call]
    pending: list[Call]  # those whose result is not cached
    response: Path

    @property
    def is_done(self) -> bool:
        """Return whether all results are there."""
        return not self.pending or self.response.exists()


def run_remotely(calls: Iterator[Call], folder: Path, numbers: Iterator[int]) -> Iterator[Any]:
    """Yield the results of all calls, in their order.

    ``numbers`` name the requests; each may come only once.
    """
    waiting: deque[Request] = deque()
    while batch := list(islice(calls, CALLS_PER_REQUEST)):
        waiting.append(_send(batch, folder / f"{batch[0].function.__name__} {next(numbers):06}.json"))
        while waiting and (waiting[0].is_done or len(waiting) == MAX_PENDING_REQUESTS):
            yield from _receive(waiting.popleft())
    while waiting:
        yield from _receive(waiting.popleft())


def _send(calls: list[Call], path: Path) -> Request:
    function, pending = calls[0].function, [call for call in calls if not call.is_cached]
    if pending:
        tasks = b",".join(task_type(function).dump_json(call.task) for call in pending)
        write_file(path, b'{"do": "%b", "tasks": [%b]}' % (function.__name__.encode(), tasks))
    return Request(calls, pending, path.with_suffix(".done"))


def _receive(request: Request) -> Iterator[Any]:
    results = iter(_wait_for_results(request.response) if request.pending else [])
    for call in request.calls:
        if call not in request.pending:
            yield run_cached(call)
            continue
        result = result_type(call.function).validate_python(next(results))
        if call.result_path:
            write_file(call.result_path, result_type(call.function).dump_json(result))
        yield result


def _wait_for_results(response: Path) -> list[Any]:
    while not response.exists():
        time.sleep(POLL_SECONDS)
    content = json.loads(response.read_bytes())
    for path in (response, response.with_suffix(".json")):
        path.unlink()
    match content:
        case {"error": str(sentence), "kind": "input"}:
            raise InputError(sentence)
        case {"error": str(sentence), "kind": "disk"}:
            raise DiskFailure(sentence)
        case {"error": str(sentence)}:
            raise ShardFailed(sentence)
    return list(content["results"])
