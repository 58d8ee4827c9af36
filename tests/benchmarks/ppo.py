"""Measure PPO: where its seconds go, its lower bound, and TRL 1.12.0 on the same workload.

python -m tests.benchmarks.ppo                           ours alone, in float32 and bfloat16
python -m tests.benchmarks.ppo float32|bfloat16 FOLDER   one round of our side, for the comparison

A random Llama of 7M parameters, LoRA of rank 8 on q and v, prompts of 48 tokens, up to 48 tokens an answer,
64 answers a batch, 4 epochs of one optimizer step in 4 micro-batches.
"""

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from tasks.config.sections.ppo import Ppo
from tasks.programs.ppo_stage.estimate_advantages import estimate_advantages
from tasks.programs.ppo_stage.update_policy import update_policy
from tasks.rlhf.batches import forward
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import fingerprint, loading, lora
from tasks.rlhf.models.reward_model import Member, Scorer
from tasks.rlhf.training.ppo_state import create_optimizers
from tasks.rlhf.training.rollouts import PpoModels, ScoreRule, roll_out
from tests.benchmarks import training
from tests.benchmarks.peer_environments import create_environment
from tests.support.paths import ROOT

PEER_NAME, PEER_PPO = "TRL 1.12.0", ROOT / ".bench" / "trl-1.12.0"
SKIP, BATCHES = 1, 4  # batches before the clock starts, and all
WORK: dict[str, Any] = {
    "rank": 8,
    "alpha": 32,
    "targets": ["q_proj", "v_proj"],
    "prompt_tokens": 48,
    "answer_tokens": 48,
    "rollouts": 64,
    "epochs": 4,
    "micro_batch": 16,
    "batches": BATCHES,
}
PARTS = {  # by phase and active adapter
    ("rollout", "policy"): "sampling",
    ("rollout", None): "reference",
    ("rollout", "critic"): "critic",
    ("rollout", "reward"): "reward model",
    ("update", "policy"): "update of the policy",
    ("update", "critic"): "update of the critic",
}


def write_workload(folder: Path) -> None:
    """Write the model and the prompts that both sides read."""
    for part in training.build_base():
        part.save_pretrained(folder / "base")
    draw = random.Random(0)
    prompts = [[draw.randint(3, 4095) for _ in range(WORK["prompt_tokens"])] for _ in range(512)]
    (folder / "work.json").write_text(json.dumps(WORK | {"prompts": prompts}))


class Breakdown:
    """Seconds of each part of PPO, by the adapter that is active."""

    def __init__(self) -> None:
        self.phase, self.seconds = "", defaultdict[tuple[str, str | None], float](float)
        self._active = lora.active

    @contextmanager
    def active(self, model: PeftModel, name: str | None) -> Iterator[PreTrainedModel]:
        """Do what `lora.active` does, and add the block's seconds."""
        started = time.perf_counter()
        with self._active(model, name) as base:
            yield base
        self.seconds[self.phase, name] += time.perf_counter() - started


def load_models(folder: Path, dtype: str) -> PpoModels:
    """Return the four roles on one base, with fresh adapters and random heads."""
    base = loading.load(folder / "base", device=torch.device("cpu"), precision=dtype)  # type: ignore[arg-type]
    actual = fingerprint.compute_fingerprint(folder / "base", base)
    torch.manual_seed(0)
    model: Any = base
    for name in ("policy", "reward", "critic"):
        config = lora.build_config(
            rank=WORK["rank"], alpha=WORK["alpha"], dropout=0.0, targets=tuple(WORK["targets"])
        )
        model = lora.attach(model, name, config)
    heads: list[nn.Linear] = [lora.new_head(base.config.hidden_size) for _ in range(2)]
    heads[0].requires_grad_(False)
    critic = {f"value_head.{name}": parameter for name, parameter in heads[1].named_parameters()}
    return PpoModels(
        model=model,
        base=actual,
        value_head=heads[1],
        reward=Scorer((Member(partial(_active, model, "reward"), heads[0]),), 0.0),
        policy=lora.parameters(model, "policy"),
        critic=lora.parameters(model, "critic") | critic,
    )


def _active(model: PeftModel, name: str) -> Any:
    return lora.active(model, name)  # looked up when it is called: the breakdown replaces it


def our_round(dtype: str, folder: Path) -> dict[str, Any]:
    """Take the steps that the program takes; return when each batch ended, and the seconds of its parts."""
    device = devices.set_up("cpu", int(os.environ["OMP_NUM_THREADS"]))
    work, models = json.loads((folder / "work.json").read_text()), load_models(folder, dtype)
    settings = Ppo(rollouts=work["rollouts"], minibatch=work["rollouts"], epochs=work["epochs"])
    optimizers, breakdown = create_optimizers(models), Breakdown()
    optimizers.set_learning_rate(3e-6)  # TRL's default
    lora.active = breakdown.active
    ends, used = [], []
    for step in range(work["batches"]):
        if step == SKIP:
            breakdown.seconds.clear()
        seeds.seed_step(0, step + 1)
        breakdown.phase = "rollout"
        rollout = roll_out(
            models,
            work["prompts"][step * work["rollouts"] :][: work["rollouts"]],
            uniform=torch.rand(work["rollouts"], work["answer_tokens"], dtype=torch.float64),
            max_tokens=work["answer_tokens"],
            temperature=0.7,  # TRL's default
            end_ids=(1,),
            pad_id=0,
            score_rule=ScoreRule("replace", -1.0),
            device=device,
        )
        breakdown.phase = "update"
        advantages, returns = estimate_advantages(rollout, settings, kl_coefficient=0.05)
        update_policy(
            models,
            optimizers,
            rollout,
            advantages,
            returns,
            settings,
            step=step + 1,
            kl_coefficient=0.05,
            micro_batch=work["micro_batch"],
            tolerance=None,
        )
        ends.append(time.perf_counter())
        used.append(time.process_time())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    batches = work["batches"] - SKIP
    seconds = {PARTS[key]: total / batches for key, total in breakdown.seconds.items()}
    return {
        "ends": ends,
        "used": used,
        "rss_mb": round(memory),
        "seconds": seconds,
        "floor": _floor(models, work),
    }


def _floor(models: PpoModels, work: dict[str, Any]) -> float:
    """Return the seconds of bare forward-backward passes over as many tokens as an update computes.

    They are those of one epoch, times the number of epochs.
    """
    ids = torch.randint(3, 4096, (work["rollouts"], work["prompt_tokens"] + work["answer_tokens"]))
    started = time.perf_counter()
    for name in ("policy", "critic"):
        for rows in ids.split(work["micro_batch"]):
            with lora.active(models.model, name) as model:
                forward.hidden_states(model, rows).sum().backward()
    seconds: float = (time.perf_counter() - started) * work["epochs"]
    return seconds


def beside_trl(rounds: int = 3) -> list[dict[str, Any]]:
    """Measure PPO in fp32 and bf16, ours and TRL in turn, each round in a process of its own."""
    python = create_environment(training.PEER, training.PEER_NEEDS)
    if not (PEER_PPO / ".ready").exists():
        target = ["--quiet", "--no-deps", "--target", str(PEER_PPO), "trl==1.12.0"]
        subprocess.run([python, "-m", "pip", "install", *target], check=True)
        (PEER_PPO / ".ready").touch()
    return compare(python, PEER_PPO, rounds=rounds)


def compare(python: Path, library: Path | None, *, rounds: int) -> list[dict[str, Any]]:
    """Run both sides in turn, TRL from the folder ``library``; without one ours alone. Print the medians."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workload(folder)
        return [
            _compare_in(dtype, folder, python, library, rounds=rounds) for dtype in ("float32", "bfloat16")
        ]


def _compare_in(
    dtype: str, folder: Path, python: Path, library: Path | None, *, rounds: int
) -> dict[str, Any]:
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_round([sys.executable, "-m", "tests.benchmarks.ppo", dtype, str(folder)], str(ROOT)))
        if library is not None:
            peer = str(ROOT / "tests" / "benchmarks" / "peer_ppo.py")
            theirs.append(_round([str(python), peer, dtype, str(folder)], str(library)))
    entry: dict[str, Any] = {"what": "PPO", "unit": "samples/s", "dtype": dtype, "peer_name": PEER_NAME}
    entry |= _medians(ours, "ours")
    note = f"{entry['ours_mb']} MB"
    if theirs:
        entry |= _medians(theirs, "peer")
        both = list(zip(ours, theirs, strict=True))
        entry["ratio"] = statistics.median(a["rate"] / b["rate"] for a, b in both)
        entry["cpu_ratio"] = statistics.median(b["cpu"] / a["cpu"] for a, b in both)
        note = (
            f"{entry['ratio']:.2f} x {PEER_NAME} ({entry['peer']:.2f}), {entry['cpu_ratio']:.2f} x by CPU "
            f"time; {entry['ours_mb']} and {entry['peer_mb']} MB"
        )
    print(f"{'PPO, ' + dtype:<56} {entry['ours']:>9.2f} samples/s {note}", flush=True)
    middle = statistics.median(one["batch_seconds"] for one in ours)
    parts = {name: statistics.median(one["seconds"][name] for one in ours) for name in PARTS.values()}
    parts["rest"] = middle - sum(parts.values())
    floor = statistics.median(one["floor"] for one in ours)
    shares = ", ".join(f"{name} {seconds / middle:.0%}" for name, seconds in parts.items())
    print(f"    {middle:.2f} s a batch: {shares}; the update's bare passes alone {floor:.2f} s", flush=True)
    return entry | {"seconds": parts, "floor": floor}


def _medians(rounds: list[dict[str, Any]], side: str) -> dict[str, Any]:
    rate, memory = (statistics.median(one[key] for one in rounds) for key in ("rate", "rss_mb"))
    return {side: rate, f"{side}_mb": memory}


def _round(command: list[str], path: str) -> dict[str, Any]:
    """Run one process; return its samples a second after the first batch, CPU seconds a batch and memory."""
    environment = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000", "PYTHONPATH": path}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    seconds = statistics.median(end - before for before, end in pairwise(found["ends"][SKIP - 1 :]))
    cpu = statistics.median(end - before for before, end in pairwise(found["used"][SKIP - 1 :]))
    return found | {"rate": WORK["rollouts"] / seconds, "batch_seconds": seconds, "cpu": cpu}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(our_round(sys.argv[1], Path(sys.argv[2]))))
    else:
        compare(Path(sys.executable), None, rounds=3)
