"""Shards: tasks that whoever started the program has done elsewhere, asked for and answered in a folder.

<name>.json   {"do": name of the function, "tasks": [...]}, written by the program, done by shard.py on any machine that sees the same folders
<name>.done   {"results": [...]}, or {"error": sentence, "kind": "input", "disk" (it is full) or "other"}, written by whoever had it done
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

CALLS_PER_REQUEST = 8  # tasks in a shard: some seconds of work, against half a second to start its program
MAX_PENDING_REQUESTS = 32  # shards asked for at a time: what they hold lies on disk meanwhile
POLL_SECONDS = 0.02


class ShardFailed(RuntimeError):
    """A shard that could not be done, and not because of the input."""


class Request(NamedTuple):
    calls: list[Call]
    pending: list[Call]  # those that are not noted
    done: Path

    @property
    def is_done(self) -> bool:
        return not self.pending or self.done.exists()


def run_remotely(calls: Iterator[Call], folder: Path, numbers: Iterator[int]) -> Iterator[Any]:
    """The results of all calls, in their order. ``numbers`` name the shards; none may come twice."""
    waiting: deque[Request] = deque()
    while shard := list(islice(calls, CALLS_PER_REQUEST)):
        waiting.append(_send(shard, folder / f"{shard[0].do.__name__} {next(numbers):06}.json"))
        while waiting and (waiting[0].is_done or len(waiting) == MAX_PENDING_REQUESTS):
            yield from _receive(waiting.popleft())
    while waiting:
        yield from _receive(waiting.popleft())


def _send(calls: list[Call], path: Path) -> Request:
    do, pending = calls[0].do, [call for call in calls if not call.is_noted]
    if pending:
        tasks = b",".join(task_type(do).dump_json(call.task) for call in pending)
        write_file(path, b'{"do": "%b", "tasks": [%b]}' % (do.__name__.encode(), tasks))
    return Request(calls, pending, path.with_suffix(".done"))


def _receive(asked: Request) -> Iterator[Any]:
    found = iter(_wait_for_results(asked.done) if asked.pending else [])
    for call in asked.calls:
        if call not in asked.pending:
            yield run_cached(call)
            continue
        result = result_type(call.do).validate_python(next(found))
        if call.note:
            write_file(call.note, result_type(call.do).dump_json(result))
        yield result


def _wait_for_results(done: Path) -> list[Any]:
    while not done.exists():
        time.sleep(POLL_SECONDS)
    found = json.loads(done.read_bytes())
    for path in (done, done.with_suffix(".json")):
        path.unlink()
    match found:
        case {"error": str(sentence), "kind": "input"}:
            raise InputError(sentence)
        case {"error": str(sentence), "kind": "disk"}:
            raise DiskFailure(sentence)
        case {"error": str(sentence)}:
            raise ShardFailed(sentence)
    return list(found["results"])
