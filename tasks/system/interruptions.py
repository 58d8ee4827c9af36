"""End a training loop between two steps, with a checkpoint, when a signal asks for it or time runs out.

SIGUSR1 asks for a checkpoint after the current step. SIGTERM and SIGINT (Ctrl-C of a program that is run by
hand) also end the process after it; a second one ends it at once, and so does one outside a loop. Slurm sends
SIGUSR1 or SIGTERM before it ends a job (``--signal``).
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from tasks.system.errors import InputError

SLURM_END, SLURM_MARGIN = "SLURM_JOB_END_TIME", 60.0  # seconds since 1970; seconds for what follows a step

ENDING = (signal.SIGTERM, signal.SIGINT)

AllReduce = Callable[[Sequence[float]], list[float]]  # sums over the ranks


class Interruptions:
    """What has asked a loop to save or to end.

    ``time_limit`` are seconds from now; 0: none. A job of Slurm also ends before Slurm's own limit.
    """

    def __init__(self, time_limit: float = 0.0) -> None:
        limits = {"machine.time_limit": time.time() + time_limit} if time_limit else {}
        if SLURM_END in os.environ:
            limits["The time of the Slurm job"] = float(os.environ[SLURM_END]) - SLURM_MARGIN
        self.limit = min(limits, key=lambda name: limits[name], default="")
        self.deadline = limits.get(self.limit, float("inf"))
        self.signals: set[int] = set()
        self.all_reduce: AllReduce = list
        self.is_in_loop = self.must_end = self.is_late = False
        self.longest = self.last = 0.0  # seconds of the longest step, and when the last one ended

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals; in the main thread only."""
        numbers = (*ENDING, signal.SIGUSR1)
        before = [signal.signal(number, self._handle) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number in ENDING and (number in self.signals or not self.is_in_loop):
            _die(number)
        self.signals.add(number)

    def during(self, steps: Iterable[int], all_reduce: AllReduce) -> Iterator[int]:
        """Yield the steps of a loop; if it must end, end the process before the next one.

        Raises InputError if time is up.
        """
        self.is_in_loop, self.all_reduce, self.last = True, all_reduce, time.monotonic()
        try:
            for step in steps:
                self._end_if_asked(step)
                yield step
            if asked := self.signals.intersection(ENDING):
                _die(min(asked))
        finally:
            self.is_in_loop = False

    def wants_checkpoint(self) -> bool:
        """Return whether to save after this step, on all ranks alike. Called once a step, at its end."""
        now = time.monotonic()
        self.longest, self.last = max(self.longest, now - self.last), now
        is_late = time.time() + 2 * self.longest > self.deadline  # the next step may take longer
        own = (signal.SIGUSR1 in self.signals, not self.signals.isdisjoint(ENDING), is_late)
        asked, self.must_end, self.is_late = (total > 0 for total in self.all_reduce([*map(float, own)]))
        self.signals.discard(signal.SIGUSR1)
        return asked or self.must_end or self.is_late

    def _end_if_asked(self, steps_done: int) -> None:
        if not (self.must_end or self.is_late):
            return
        self.all_reduce([0.0])  # the first rank has saved
        if self.must_end:  # perhaps by a signal to another rank
            _die(min(self.signals.intersection(ENDING), default=signal.SIGTERM))
        raise InputError(
            f"{self.limit} is nearly used up, so training ended after step {steps_done}, which is saved: "
            "the same command goes on from there."
        )


def _die(number: int) -> None:
    """End the process as the signal does if nobody handles it, so that its parent sees the cause."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
