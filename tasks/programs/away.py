"""Shards: tasks that whoever started the program has done elsewhere, asked for and answered in a folder.

<name>.json   {"do": name of the function, "tasks": [...]}, written by the program, done by shard.py on any machine that sees the same folders
<name>.done   {"results": [...]}, or {"error": sentence, "input": whether it is the user's to mend}, written by whoever had it done
"""

import json
import time
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tasks.programs.call import Call, answer, result_type, task_type, write_whole
from tasks.rlhf.refusal import InputError

SHARD = 8  # tasks in a shard: some seconds of work, against half a second to start its program
AHEAD = 32  # shards asked for at a time: what they hold lies on disk meanwhile
POLL_SECONDS = 0.02


class ShardFailed(RuntimeError):
    """A shard that could not be done, and not because of the input."""


class Asked(NamedTuple):
    calls: list[Call]
    done: Path | None  # None: all were noted before

    @property
    def is_done(self) -> bool:
        return self.done is None or self.done.exists()


def results(calls: Iterator[Call], folder: Path) -> Iterator[Any]:
    """The results of all calls, in their order."""
    waiting: deque[Asked] = deque()
    number = 0
    while shard := list(islice(calls, SHARD)):
        waiting.append(_ask(shard, folder / f"{shard[0].do.__name__} {number:06}.json"))
        number += 1
        while waiting and (waiting[0].is_done or len(waiting) == AHEAD):
            yield from _taken(waiting.popleft())
    while waiting:
        yield from _taken(waiting.popleft())


def _ask(calls: list[Call], path: Path) -> Asked:
    if all(call.is_noted for call in calls):
        return Asked(calls, None)
    do = calls[0].do
    tasks = b",".join(task_type(do).dump_json(call.task) for call in calls)
    write_whole(path, b'{"do": "%b", "tasks": [%b]}' % (do.__name__.encode(), tasks))
    return Asked(calls, path.with_suffix(".done"))


def _taken(asked: Asked) -> Iterator[Any]:
    if asked.done is None:
        yield from map(answer, asked.calls)
        return
    while not asked.is_done:
        time.sleep(POLL_SECONDS)
    found = json.loads(asked.done.read_bytes())
    for path in (asked.done, asked.done.with_suffix(".json")):
        path.unlink()
    if "error" in found:
        raise (InputError if found["input"] else ShardFailed)(found["error"])
    for call, plain in zip(asked.calls, found["results"], strict=True):
        result = result_type(call.do).validate_python(plain)
        if call.note:
            write_whole(call.note, result_type(call.do).dump_json(result))
        yield result
