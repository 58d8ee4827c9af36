"""Define what `alignflow doctor` finds, and run its checks so that a failing check hides no other."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "FAIL"]
Findings = Iterator["Finding"]
Check = Callable[[], Findings]


class Finding(NamedTuple):
    """One line of the doctor: what was checked, what was found, and what the user can do about it."""

    level: Level
    what: str
    detail: str
    todo: str = ""


def judge(what: str, fine: str, problem: str = "", todo: str = "", level: Level = "warn") -> Finding:
    """Return a finding of ``level`` if there is a problem, else that all is well."""
    return Finding(level, what, problem, todo) if problem else Finding("ok", what, fine)


def run_check(what: str, check: Check, todo: str = "") -> Findings:
    """Yield the findings of a check; if it raises, a failure with the first line of the error."""
    try:
        yield from check()
    except Exception as error:
        yield Finding("FAIL", what, (str(error).strip() or type(error).__name__).splitlines()[0][:300], todo)
