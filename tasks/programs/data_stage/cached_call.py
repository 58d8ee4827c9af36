"""Call a function and cache its result on disk as JSON, for when the program is restarted."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter

from tasks.system.files import replacing

# A function of a module with one argument; its annotations say how argument and result are written as JSON.
Function = Callable[[Any], Any]


class Call(NamedTuple):
    """A function, its argument, and the file that its result is cached in (None: nowhere)."""

    function: Function
    task: Any
    result_path: Path | None = None

    @property
    def is_cached(self) -> bool:
        """Return whether the result is on disk."""
        return self.result_path is not None and self.result_path.exists()


def run_cached(call: Call) -> Any:
    """Return the cached result of a call; if there is none, call the function and cache its result."""
    if call.result_path and call.result_path.exists():
        return read_cached(call.function, call.result_path)
    result = call.function(call.task)
    if call.result_path:
        write_file(call.result_path, result_type(call.function).dump_json(result))
    return result


def read_cached(function: Function, path: Path) -> Any:
    """Return a cached result."""
    return result_type(function).validate_json(path.read_bytes())


@cache
def task_type(function: Function) -> TypeAdapter[Any]:
    """Return what converts the function's argument to JSON and back."""
    (parameter,) = signature(function).parameters
    return TypeAdapter(get_type_hints(function)[parameter])


@cache
def result_type(function: Function) -> TypeAdapter[Any]:
    """Return what converts the function's result to JSON and back."""
    return TypeAdapter(get_type_hints(function)["return"])


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is made if it is missing."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as new:
        new.write_bytes(content)
