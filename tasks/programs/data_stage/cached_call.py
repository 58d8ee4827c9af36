"""One call of a function, and its result as a note in JSON: whoever finds the note need not call again."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter

from tasks.system.files import replacing

Function = Callable[
    [Any], Any
]  # a function of a module, with one argument; its annotations say how both ways are written in JSON


class Call(NamedTuple):
    do: Function
    task: Any
    note: Path | None = None

    @property
    def is_noted(self) -> bool:
        return self.note is not None and self.note.exists()


def run_cached(call: Call) -> Any:
    """The result of a call, from its note if there is one; else it is noted."""
    if call.note and call.note.exists():
        return read_cached(call.do, call.note)
    found = call.do(call.task)
    if call.note:
        write_file(call.note, result_type(call.do).dump_json(found))
    return found


def read_cached(do: Function, note: Path) -> Any:
    return result_type(do).validate_json(note.read_bytes())


@cache
def task_type(do: Function) -> TypeAdapter[Any]:
    (parameter,) = signature(do).parameters
    return TypeAdapter(get_type_hints(do)[parameter])


@cache
def result_type(do: Function) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(do)["return"])


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as new:
        new.write_bytes(content)
