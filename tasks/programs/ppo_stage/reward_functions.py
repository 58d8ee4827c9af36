"""Call a reward function of the user's, and refuse what it returns or raises with one sentence."""

import importlib
import math
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tasks.config.sections.rewards import RewardFunction
from tasks.system.errors import InputError
from tasks.system.module_sources import find_module, source_digest

Function = Callable[[list[str], list[str]], Iterable[float]]


class LoadedFunction(NamedTuple):
    """A function that scores answers, and the setting that names it."""

    call: Function
    setting: str  # in messages

    def __call__(self, questions: list[str], answers: list[str]) -> list[float]:
        """Return the number of each answer. Raises InputError."""
        try:
            values = list(self.call([*questions], [*answers]))
        except Exception as error:  # the user's code may raise anything
            raise InputError(f"{self.setting} raised {_describe(error)}") from error
        if len(values) != len(answers):
            raise InputError(
                f"{self.setting} returned {len(values)} numbers for {len(answers)} answers: it must return "
                "one for each"
            )
        return [self._number(value, place, answers) for place, value in enumerate(values)]

    def _number(self, value: Any, place: int, answers: list[str]) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise InputError(
                f"{self.setting} returned {type(value).__name__} instead of a number for answer {place + 1} "
                f"of {len(answers)}, {answers[place][:60]!r}"
            ) from None
        if not math.isfinite(number):
            raise InputError(
                f"{self.setting} returned {number} for answer {place + 1} of {len(answers)}, "
                f"{answers[place][:60]!r}: return a finite number"
            )
        return number


def load_function(settings: RewardFunction, digest: str | None) -> LoadedFunction:
    """Import the function. ``digest`` is that of the source that is in the stage's key, None if unknown.

    Raises InputError if it cannot be imported, is no function, or has another source here.
    """
    setting = f"ppo.rewards.functions {settings.name} ({settings.function})"
    module, _, name = settings.function.partition(":")
    if find_module(module) is None:
        raise InputError(
            f"{setting} cannot be imported here: install the module {module}, or put the folder that holds "
            "it on PYTHONPATH, on every machine on which the stage runs"
        )
    if digest is not None and source_digest(module) != digest:
        raise InputError(
            f"{setting} has another source here than where the run was started: put the same files on both "
            "machines, or start the run again"
        )
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # the user's code may raise anything
        raise InputError(f"{setting}: importing {module} raised {_describe(error)}") from error
    if not hasattr(loaded, name):
        raise InputError(f"{setting}: the module {module} has no function {name}")
    function = getattr(loaded, name)
    if not callable(function):
        raise InputError(f"{setting} is no function but {type(function).__name__}")
    return LoadedFunction(function, setting)


def _describe(error: Exception) -> str:
    """Return the type, the first line of the message and the place of an error."""
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {frames[-1].filename.rpartition('/')[2]})" if frames else ""
    return f"{type(error).__name__}{f': {text}' if text else ''}{place}"
