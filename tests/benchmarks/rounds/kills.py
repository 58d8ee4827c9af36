"""Kill a run of rounds with -9 in every stage of every round, go on each time, and compare the artifacts.

python -m tests.benchmarks.rounds.kills [--rounds 2]

The orchestration is real; the programs are small fakes, whose result depends on their job and inputs. First
the flow is killed together with its program, once in each stage of each round; then, in another home, one
program of every stage alone. Digests of all artifacts must be those of an undisturbed run.
"""

import argparse
import json
import os
import signal
import tempfile
from pathlib import Path

from tests.support import fake_programs

STAGES = (*fake_programs.ROUND_STAGES, "reward", "ppo", "answers", "winrate", "benchmarks", "report")
STEP = 3  # of 5, at which a program is killed


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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
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
