"""Copy the source tree with fake programs: real orchestration and real processes, without torch."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tasks.artifacts.code_version import program_module
from tests.support.paths import ROOT

STAGES = (
    "site",
    "data",
    "pretrain",
    "sft",
    "merge",
    "reward",
    "ppo",
    "reference",
    "dpo",
    "answers",
    "winrate",
    "benchmarks",
    "report",
)

ROUND_STAGES = ("candidates", "asked", "comparisons", "mixture")  # of the flow rounds alone
TABLES_OF = {
    "data": ("finetune", "corpus", "reward", "reward_groups", "rl", "evaluation", "evaluation_pairs"),
    **{stage: (stage,) for stage in ROUND_STAGES[:3]},
    "mixture": ("reward",),
    "reference": ("reference", "reference_evaluation"),
    "answers": ("answers",),
}
TABLES = (*TABLES_OF["data"], *ROUND_STAGES[:3])
# the files that a stage reads of an input, if not all; test_artifact.py compares them with the real programs
MEANT: dict[str, dict[str, tuple[str, ...]]] = {
    "pretrain": {"data": ("corpus.parquet",)},
    "sft": {"data": ("finetune.parquet", "evaluation.parquet")},
    "merge": {"adapter": ("adapter",)},
    "reward": {"data": ("reward.parquet", "finetune.parquet", "evaluation_pairs.parquet")},
    "ppo": {"data": ("rl.parquet", "evaluation.parquet"), "reward": ("adapter", "reward.json")},
    "reference": {"data": ("reward.parquet", "evaluation_pairs.parquet")},
    "dpo": {
        "data": ("reward.parquet", "evaluation_pairs.parquet", "evaluation.parquet"),
        "reference": ("reference.parquet", "reference_evaluation.parquet"),
    },
    "answers": {"data": ("evaluation.parquet",), "ppo": ("adapter",), "dpo": ("adapter",)},
    "winrate": {
        "data": ("evaluation.parquet", "evaluation_pairs.parquet"),
        "reward": ("adapter", "reward.json"),
        "answers": ("answers.parquet",),
    },
    "benchmarks": {"data": ("evaluation.parquet",), "ppo": ("adapter",), "dpo": ("adapter",)},
}
OF_ROUNDS: dict[
    str, dict[str, tuple[str, ...]]
] = {  # the same of the inputs that only rounds have; of numbered ones the name is without its number
    "candidates": {"data": ("rl.parquet",), "policy": ("adapter",), "reward": ("adapter", "reward.json")},
    "asked": {"candidates": ("candidates.parquet",), "before": ("asked.parquet",)},
    "comparisons": {"asked": ("asked.parquet",)},
    "mixture": {"data": ("reward.parquet",), "comparisons": ("comparisons.parquet",)},
    "reward": {"mixture": ("reward.parquet",)},
    "ppo": {"start": ("adapter",)},
    "answers": {"predecessor": ("adapter",)},
}

# Takes a few steps with a checkpoint each, and derives its result from its job and the content of its inputs.
# FAKE_<STAGE> (a file in the tree) says how to misbehave: "slow", "meet STAGE", "input", "fail", "enospc",
# "hang-at 3", "fill-at 3" (the disk of its home), "spawn", "warn", "die-at 3" (once), "verdicts wl" (of
# winrate: its first build wins against the last round, its second one loses, the others are undecided);
# "MODE of STEPS": so with that many steps of PPO alone, since a lost run may come back at any time.
PROGRAM = '''"""A fake program."""
import contextlib, errno, hashlib, json, os, shutil, subprocess, sys, time
from pathlib import Path
from tasks.config.jobs import {job}
from tasks.system.errors import InputError
from tasks.programs.runtime.program import Run, main
{more}
STEPS = 5


def never():
    import torch  # by its imports it is a program for the fork server


# in two parts, since a file that a program names is part of its version
MODE = Path(__file__).with_name("FAKE" + "_{name}")


def train(config, run):
    mode, _, steps = (MODE.read_text() if MODE.exists() else "").partition(" of ")
    if steps and config.ppo.steps != int(steps):
        mode = ""
    print("hello from {name}")
    if mode == "input":
        raise InputError("These posts hold no question with two answers.")
    if mode == "fail":
        raise RuntimeError("CUDA went away")
    if mode == "enospc":
        raise OSError(errno.ENOSPC, "No space left on device")
    saved = sorted(run.checkpoints.glob("step-*"))
    start = json.loads((saved[-1] / "state.json").read_text())["step"] if saved else 0
    with MODE.with_name("BEGAN" + "_{name}").open("a") as began:
        began.write(f"{{start}}\\n")
    run.rewind(start)
    for step in range(start + 1, STEPS + 1):
        if mode == "slow":
            time.sleep(0.3)
        if mode.startswith("meet ") and step == 2:  # go on once another program is at work as well
            MODE.with_name("MET" + "_{name}").touch()
            deadline = time.monotonic() + 900
            while not MODE.with_name("MET_" + mode.split()[1]).exists():
                assert time.monotonic() < deadline, "the other program did not start"
                time.sleep(0.05)
        if mode == "spawn":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (run.directory / "child.pid").write_text(str(child.pid))
            mode = "hang-at 1"
        run.log(step, STEPS, loss=1.0 / step, kl=0.1 * step)
        with (run.directory / "taken.txt").open("a") as taken:
            taken.write(f"{{step}}\\n")
        if mode == f"fill-at {{step}}":
            filler_path = run.directory.parents[1] / "filler"
            with contextlib.suppress(OSError), filler_path.open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
        if mode == f"hang-at {{step}}":
            time.sleep(600)
        if mode == f"die-at {{step}}":
            MODE.write_text("")
            os.kill(os.getpid(), 9)
        new = run.checkpoints / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / "state.json").write_text(json.dumps({{"step": step}}))
        os.rename(new, run.checkpoints / f"step-{{step:08d}}")
        for old in saved:
            shutil.rmtree(old)
        saved = [run.checkpoints / f"step-{{step:08d}}"]
    inputs = {{}}
    for name, path in run.inputs.items():
        places = [path / part for part in {meant}.get(name.rstrip("0123456789"), ())] or [path]
        found = [[place] if place.is_file() else sorted(place.rglob("*")) for place in places]
        files = [file for of_place in found for file in of_place]
        kept = [file for file in files if file.is_file() and file.name != "manifest.json"]
        inputs[name] = hashlib.sha256(b"".join(file.read_bytes().strip() for file in kept)).hexdigest()
    content = json.dumps([config.model_dump(mode="json", exclude={{"source"}}), inputs], sort_keys=True)
    (run.artifact / "weights.json").write_text(content)
    (run.artifact / "reward.json").write_text(content)
    (run.artifact / "adapter").mkdir(exist_ok=True)
    (run.artifact / "adapter" / "adapter_config.json").write_text(content)
    (run.artifact / "model").mkdir(exist_ok=True)
    (run.artifact / "model" / "config.json").write_text(json.dumps(inputs))
    (run.artifact / "Posts.xml").write_text("<posts/>")
    for table in {tables}:
        (run.artifact / f"{{table}}.parquet").write_text(content)
    (run.artifact / "report.html").write_text("<html><body><!--stage-table--></body></html>")
    (run.artifact / "card.html").write_text("<html><body></body></html>")
    (run.artifact / "headline.json").write_text('{{"sentence": "PPO wins"}}')
    if mode == "warn":
        run.warn("No answer ended.")
    rate = {{"value": 0.7, "low": 0.6, "high": 0.8, "n": 10}}
    metrics = {{"{name}.kl": 0.5, "gold_win_rate.{name}": rate}}
    if mode.startswith("verdicts "):
        number = len(MODE.with_name("BEGAN" + "_{name}").read_text().split())
        undecided = {{**rate, "low": 0.4}}
        lost = {{**rate, "value": 0.3, "low": 0.2, "high": 0.4}}
        verdict = {{"w": rate, "l": lost}}.get(mode.split()[1][number - 1 : number], undecided)
        metrics["gold_win_rate.ppo_vs_predecessor"] = verdict
        metrics["gold_win_rate.ppo_vs_sft"] = rate
    run.finish(metrics)


if __name__ == "__main__":
    main(train, {job})
'''


def make_tree(folder: Path) -> Path:
    """Copy flows, tasks and profiles to ``folder`` and put fake programs in."""
    for name in ("flows", "tasks"):
        # bytecode too: its sources keep their times
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("rlhf"))
    shutil.copytree(ROOT / "deployments" / "profiles", folder / "deployments" / "profiles")
    shutil.copy(ROOT / "deployments" / "prefect.yaml", folder / "deployments" / "prefect.yaml")
    (folder / "tasks" / "rlhf").mkdir()
    (folder / "tasks" / "rlhf" / "__init__.py").touch()
    for stage in (*STAGES, *ROUND_STAGES):
        write_program(folder, stage)
    server = folder / "tasks" / "programs" / "runtime" / "fork_server.py"
    server.write_text(server.read_text().replace("PRELOADED = (", "PRELOADED = ()\nUSUALLY = ("))
    return folder


def program_file(tree: Path, stage: str) -> Path:
    """Return the file of a stage's program, which may lie in a subfolder of the programs."""
    return tree.joinpath(*program_module(stage, root=tree).split(".")).with_suffix(".py")


def write_program(tree: Path, stage: str, more: str = "") -> None:
    meant = MEANT.get(stage, {}) | OF_ROUNDS.get(stage, {})
    program_file(tree, stage).write_text(
        PROGRAM.format(
            name=stage,
            job=f"{stage.capitalize()}Job",
            more=more,
            meant=meant,
            tables=TABLES_OF.get(stage, ()),
        )
    )


def misbehave(tree: Path, stage: str, mode: str) -> None:
    """Set how a stage's program misbehaves ('': not at all); this is not part of the program's version."""
    program_file(tree, stage).with_name(f"FAKE_{stage}").write_text(mode)


def start_steps(tree: Path, stage: str) -> list[int]:
    """Return the step from which a stage's program has started, for each of its starts."""
    began = program_file(tree, stage).with_name(f"BEGAN_{stage}")
    return [int(line) for line in began.read_text().split()]


def environment(tree: Path, home: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT", "MLFLOW", "ALIGNFLOW", "PYTHON"))
    }
    return {**kept, "PYTHONPATH": str(tree), "ALIGNFLOW_HOME": str(home)}


def start_cli(tree: Path, home: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Start the command line of the tree."""
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.Popen(
        command,
        cwd=home.parent,
        env=environment(tree, home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run_cli(tree: Path, home: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command line of the tree to its end; return status, stdout and stderr."""
    with start_cli(tree, home, *arguments) as process:
        try:
            out, error = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, out, error


def is_alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 900, every: float = 0.05) -> Any:
    """Wait until ``condition`` returns something true; return it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(every)
    return found
