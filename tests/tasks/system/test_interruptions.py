"""Test when a loop is asked to save or to end."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tasks.system import interruptions
from tasks.system.errors import InputError
from tasks.system.interruptions import Interruptions
from tests.support.paths import ROOT


def run(asked: Interruptions, *, number: int | None = None, at: int = 2, seconds: float = 0.0) -> list[int]:
    """Take five steps, the signal during one of them. Return the steps after which a checkpoint is wanted."""
    saved = []
    with asked.listening():
        for step in asked.during(range(5), list):
            if step == at and number is not None:
                os.kill(os.getpid(), number)
            time.sleep(seconds)
            if asked.wants_checkpoint():
                saved.append(step)
    return saved


def test_nothing_is_asked_of_an_undisturbed_loop() -> None:
    assert run(Interruptions()) == []
    assert run(Interruptions(time_limit=3600)) == []


def test_sigusr1_asks_once() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    assert run(Interruptions(), number=signal.SIGUSR1) == [2]
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_end_saves_and_ends_the_process_after_its_step(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    ended: list[int] = []

    def die(by: int) -> None:
        ended.append(by)
        raise SystemExit

    monkeypatch.setattr(interruptions, "_die", die)
    asked = Interruptions()
    with pytest.raises(SystemExit):
        run(asked, number=number)
    assert ended == [number]
    assert asked.must_end
    with pytest.raises(SystemExit):  # at the loop's end, if it comes in its last step
        run(Interruptions(), number=number, at=4)


OUTSIDE = """
import os, signal
from tasks.system.interruptions import Interruptions
asked = Interruptions()
with asked.listening():
    for step in asked.during(range(2), list):
        {inside}
    {outside}
print("still here")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("pass", "os.kill(os.getpid(), signal.NUMBER)"),
        ("[os.kill(os.getpid(), signal.NUMBER) for _ in range(2)]; print('twice')", "pass"),
    ],
)
def test_a_signal_to_end_outside_a_loop_or_twice_ends_at_once(inside: str, outside: str, name: str) -> None:
    inside, outside = (text.replace("NUMBER", name) for text in (inside, outside))
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE.format(inside=inside, outside=outside)],
        cwd=ROOT,
        capture_output=True,
        check=False,
        text=True,
    )
    assert (done.returncode, done.stdout) == (-signal.Signals[name], "")


def test_a_loop_ends_before_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError, match=r"^machine\.time_limit is nearly used up, .* after step \d, which is"
    ):
        run(Interruptions(time_limit=1), seconds=0.25)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 61))
    asked = Interruptions(time_limit=3600)
    assert asked.limit == "The time of the Slurm job"
    with pytest.raises(InputError, match="The time of the Slurm job"):
        run(asked, seconds=0.25)


def test_ranks_agree() -> None:
    asked, other = Interruptions(), iter([0, 1, 0])  # which steps another rank gets the signal in
    steps = asked.during(range(3), lambda own: [own[0] + next(other), *own[1:]])
    assert [asked.wants_checkpoint() for _ in steps] == [False, True, False]
