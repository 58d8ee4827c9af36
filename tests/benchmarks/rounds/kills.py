"""Kill a run of rounds with -9 in every stage of every round, go on each time, and compare the artifacts.

python -m tests.benchmarks.rounds.kills [--rounds 2] [--real KILLS]

The orchestration is real; the programs are small fakes, whose result depends on their job and inputs. First
the flow is killed together with its program, once in each stage of each round; then, in another home, one
program of every stage alone. Digests of all artifacts must be those of an undisturbed run. With --real the
programs are the real ones, on a small site, and flow and program are killed at random moments of the rounds.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support import fake_programs
from tests.support.paths import ROOT

STAGES = (*fake_programs.ROUND_STAGES, "reward", "ppo", "answers", "winrate", "benchmarks", "report")
STEP = 3  # of 5, at which a program is killed
# of the profile `rounds`, with the real programs
SMALL = [
    "rounds.stop=never", "rounds.start=policy", "rounds.comparisons=40", "rounds.choose.by=disagreement",
    "reward.members=2", "ppo.steps=6", "base.steps=100", "sft.max_steps=30",
    "reward.red_team_answers=16", "machine.checkpoint_steps=2", "machine.threads=1",
]  # fmt: skip


def command(rounds: int) -> list[str]:
    return ["rounds", "demo", "--set", f"rounds.count={rounds}", "--set", "rounds.stop=never"]


def finish(tree: Path, home: Path, rounds: int) -> None:
    """Run to the end."""
    status, out, error = fake_programs.run_cli(tree, home, *command(rounds))
    assert (status, error) == (0, ""), out + error


def hangs(home: Path, stage: str) -> bool:
    """Return whether a program of the stage has come to the step at which it waits to be killed."""
    for path in home.glob("partial/*/job.json"):
        taken = path.with_name("taken.txt")
        if json.loads(path.read_text())["stage"] == stage and taken.exists():
            return str(STEP) in taken.read_text()
    return False


def kill_in(tree: Path, home: Path, stage: str, rounds: int) -> None:
    """Start the rounds, and kill them when the next program of ``stage`` is at work."""
    fake_programs.misbehave(tree, stage, f"hang-at {STEP}")
    process = fake_programs.start_cli(tree, home, *command(rounds))
    fake_programs.wait_until(lambda: hangs(home, stage) or process.poll() is not None)
    assert process.poll() is None, f"it ended before {stage}"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    fake_programs.misbehave(tree, stage, "")


def digests(home: Path) -> dict[str, str]:
    """Return the digest of every artifact by its key."""
    manifests = [json.loads(path.read_text()) for path in home.glob("objects/*/*/manifest.json")]
    return {one["key"]: one["digest"] for one in manifests}


def start_real(log: Path, home: Path, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """Start the command line with the real programs, in a process group of its own."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=home.parent,
            env=fake_programs.environment(ROOT, home),
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def compare_real(folder: Path, rounds: int, kills: int) -> None:
    """Kill rounds of the real programs: each time when a random number of artifacts is there, and then up to
    a stage's mean time later.
    """
    whole, killed = folder / "whole", folder / "killed"
    settings = [f"rounds.count={rounds}", *SMALL]
    arguments = ["rounds", "rounds", *(word for one in settings for word in ("--set", one))]
    log, started = folder / "log.txt", time.monotonic()
    assert start_real(log, whole, arguments).wait() == 0, log.read_text()[-3000:]
    wanted = digests(whole)
    mean_seconds = (time.monotonic() - started) / len(wanted)
    print(f"undisturbed: {len(wanted)} artifacts, {mean_seconds:.0f} s each", flush=True)
    rng = random.Random(0)
    for made in sorted(rng.choices(range(len(wanted) - 1), k=kills)):
        delay = rng.random() * mean_seconds
        process = start_real(log, killed, arguments)
        while len(digests(killed)) < made:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        time.sleep(delay)
        assert process.poll() is None, "it had ended before"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        print(f"killed {delay:.0f} s after artifact {made}: {len(digests(killed))} are there", flush=True)
    assert start_real(log, killed, arguments).wait() == 0, log.read_text()[-3000:]
    found = digests(killed)
    differing = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    assert not differing, f"other digests: {', '.join(differing)}"
    print(f"{kills} kills: {len(wanted)} artifacts with equal digests", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--real", type=int, default=0, metavar="KILLS")
    options = parser.parse_args()
    rounds = options.rounds
    with tempfile.TemporaryDirectory() as folder:
        if options.real:
            compare_real(Path(folder), rounds, options.real)
            return
        tree = fake_programs.make_tree(Path(folder) / "tree")
        whole, of_flow, of_programs = (Path(folder) / name for name in ("whole", "flow", "programs"))
        finish(tree, whole, rounds)
        wanted = digests(whole)
        for number in range(1, rounds + 1):
            for stage in STAGES:
                kill_in(tree, of_flow, stage, rounds)
            print(f"round {number}: the flow was killed in {len(STAGES)} stages", flush=True)
        finish(tree, of_flow, rounds)
        assert digests(of_flow) == wanted
        print(f"{len(wanted)} artifacts with equal digests", flush=True)
        for stage in STAGES:
            fake_programs.misbehave(tree, stage, f"die-at {STEP}")
        finish(tree, of_programs, rounds)
        assert digests(of_programs) == wanted
        print(f"{len(STAGES)} programs were killed: {len(wanted)} artifacts with equal digests", flush=True)


if __name__ == "__main__":
    main()
