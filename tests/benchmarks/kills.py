"""Kill PPO with -9 at random moments of a run, resume it each time, and compare with an undisturbed run.

python -m tests.benchmarks.kills [--kills 20] [--algorithms ppo rloo grpo] [--processes 1 2]

The moments are spread over the whole run. Bytes of the artifact must be equal, and every step logged once.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.programs.ppo import ppo_jobs
from tests.support.fake_programs import wait_until
from tests.support.paths import ROOT

STEPS = 24
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"kl_target": 0.2, "kl_horizon": 100, "ptx": {"gradient_share": 0.5, "measured_steps": 30}},
    "rloo": {"algorithm": "rloo", "on_alarm": "stop", "kl_budget": 1e3, "missing_eos": "add"},
    "grpo": {"algorithm": "grpo", "kl_penalty": "k3", "on_alarm": "raise_kl", "missing_eos": "add"},
}


def start(folder: Path, processes: int) -> "subprocess.Popen[bytes]":
    """Start the program, in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "tasks.programs.ppo", str(folder)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def steps(folder: Path) -> list[int]:
    """Return the steps that are logged whole."""
    path = folder / "metrics.jsonl"
    lines = (path.read_text() if path.exists() else "").split("\n")[:-1]
    return [line["step"] for line in map(json.loads, lines) if "phase" not in line]


def digests(artifact: Path) -> dict[str, str]:
    """Return the sha256 of every file."""
    return {
        str(path.relative_to(artifact)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(artifact.rglob("*"))
        if path.is_file()
    }


def finish(folder: Path, processes: int) -> float:
    """Run to the end. Return the seconds from the first step to the last."""
    assert start(folder, processes).wait() == 0, (folder / "log.txt").read_text()[-3000:]
    times = [json.loads(line)["time"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return float(times[-1] - times[0])


def kill(folder: Path, processes: int, *, after: int, delay: float) -> None:
    """Start the program and kill it ``delay`` seconds after it has logged step ``after``."""
    process = start(folder, processes)
    wait_until(lambda: max(steps(folder), default=0) >= after or process.poll() is not None, 300, every=0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it had ended before"


def compare(root: Path, algorithm: str, processes: int, kills: int, inputs: dict[str, Path]) -> str:
    """Return a line about one algorithm on a number of processes."""
    rng = random.Random(f"{algorithm}/{processes}")
    whole, killed = root / f"whole-{algorithm}-{processes}", root / f"killed-{algorithm}-{processes}"
    for folder in (whole, killed):
        machine = {"checkpoint_steps": 20}  # PPO saves every second step
        ppo_jobs.write_run(folder, inputs, machine=machine, **{"steps": STEPS} | SETTINGS[algorithm])
    seconds = finish(whole, processes) / STEPS
    for after in sorted(rng.choices(range(STEPS - 1), k=kills)):
        kill(killed, processes, after=after, delay=rng.random() * seconds)
    finish(killed, processes)
    wanted, found = digests(whole / "artifact"), digests(killed / "artifact")
    differing = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    assert not differing, f"{algorithm} on {processes} processes: other bytes in {', '.join(differing)}"
    assert steps(killed) == list(range(1, STEPS + 1))
    return f"{kills} kills, {len(wanted)} files with equal bytes, {STEPS} steps logged once each"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--algorithms", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = ppo_jobs.write_inputs(Path(folder) / "inputs")
        for algorithm in options.algorithms:
            for processes in options.processes:
                line = compare(Path(folder), algorithm, processes, options.kills, inputs)
                print(f"{algorithm:<5} {processes} processes: {line}", flush=True)


if __name__ == "__main__":
    main()
