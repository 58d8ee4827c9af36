"""Steps of a stage that square numbers.

They lie apart from the tests because a process of a pool imports the module of a step, and that of the tests
imports torch.
"""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from tasks.system.errors import InputError


class Task(NamedTuple):
    number: int
    output: Path


class Counts(NamedTuple):
    squares: int


def write_square(task: Task) -> Counts:
    time.sleep(0.02 * (task.number % 3))
    task.output.write_text(str(task.number**2))
    return Counts(task.number**2)


def refuse_three(task: Task) -> Counts:
    if task.number == 3:
        raise InputError("three is refused")
    return write_square(task)


def kill_at_three(task: Task) -> Counts:
    if task.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return write_square(task)
