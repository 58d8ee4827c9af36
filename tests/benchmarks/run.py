"""Print rates of the hot paths beside their lower bounds, each the median of several rounds: `make bench`.

python -m tests.benchmarks.run
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from transformers import LlamaForCausalLM

from tasks.rlhf.batches import forward, sampling, sequences, shared_prompt
from tasks.rlhf.batches.packing import IGNORE, Document, block_loss, pack
from tasks.rlhf.models import builtin, lora
from tests.benchmarks import data as data_benchmarks
from tests.benchmarks import ppo as ppo_benchmarks
from tests.benchmarks import training as training_benchmarks
from tests.support.paths import ROOT

ROUNDS = 9


def median(work: Callable[[], object], rounds: int = ROUNDS, warmup: int = 2) -> float:
    """Return the median seconds of a function after some rounds of warm-up."""
    seconds = []
    for _ in range(rounds + warmup):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[warmup:])


def show(what: str, rate: float, unit: str, note: str = "") -> None:
    print(f"{what:<44} {rate:>12,.0f} {unit:<10} {note}", flush=True)


def demo_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return builtin.new_llama(
        vocabulary=1024, hidden_size=128, num_layers=3, num_heads=4, context=256, pad_id=0, eos_id=1
    )


def training() -> None:
    """Measure an SFT step on packed blocks; its floor is a bare forward and backward over as many tokens."""
    base = demo_model().requires_grad_(False)
    model = lora.attach(base, "sft", lora.build_config(rank=16, alpha=32, dropout=0.0, targets="all-linear"))
    parameters = lora.parameters(model, "sft")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    documents = [
        Document(torch.randint(2, 1024, (36,)).tolist(), [False] * 16 + [True] * 20) for _ in range(56)
    ]
    blocks = pack(documents, block_tokens=256, pad_id=0)
    count, rows, tokens = (
        int((blocks.labels != IGNORE).sum()),
        torch.arange(len(blocks.labels)),
        blocks.labels.numel(),
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        block_loss(base, blocks, rows, torch.device("cpu"), count=count).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

    def floor() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward.hidden_states(base, blocks.input_ids, blocks.position_ids).sum().backward()

    ours, bare = median(step), median(floor)
    show("bare forward-backward, LoRA r 16", tokens / bare, "tokens/s")
    show("SFT step, packed", tokens / ours, "tokens/s", f"{bare / ours:.0%} of the bare rate")


def comparing() -> None:
    """Measure a reward model's step on 8 questions of 5 answers: with and without shared prompts and folded
    adapters.
    """
    base = demo_model().requires_grad_(False)
    model = lora.attach(
        base, "reward", lora.build_config(rank=8, alpha=32, dropout=0.0, targets="all-linear")
    )
    parameters, head = lora.parameters(model, "reward"), lora.new_head(base.config.hidden_size)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, fused=True)
    asked = [
        (torch.randint(2, 1024, (18,)).tolist(), [torch.randint(2, 1024, (16,)).tolist() for _ in range(5)])
        for _ in range(8)
    ]
    alone = (
        [prompt for prompt, answers in asked for _ in answers],
        [answer for _, answers in asked for answer in answers],
    )
    cpu, most, small = torch.device("cpu"), lora.MERGE_UP_TO, lora.SMALL_WEIGHT

    def step(shared: bool, folded: bool) -> None:
        lora.MERGE_UP_TO, lora.SMALL_WEIGHT = (most, small) if folded else (0, 0)
        optimizer.zero_grad(set_to_none=True)
        with lora.active(model, "reward"):
            if shared:
                score = shared_prompt.scores(
                    base,
                    head,
                    shared_prompt.join(asked, pad_id=0, device=cpu, hidden_size=base.config.hidden_size),
                )
            else:
                score = sequences.scores(base, head, sequences.join(*alone, pad_id=0, device=cpu))
            score.sum().backward()
        optimizer.step()

    seconds = {
        choice: median(partial(step, *choice)) for choice in ((True, True), (True, False), (False, False))
    }
    ours = seconds[True, True]
    note = (
        f"{seconds[True, False] / ours:.2f} x with adapters apart, {seconds[False, False] / ours:.2f} x "
        "with prompts repeated as well"
    )
    show("reward step, 5 answers a question", 40 / ours, "answers/s", note)


def sampler() -> None:
    """Measure sampling 64 answers of 48 tokens; the floor is one forward pass over the same tokens."""
    base = demo_model().requires_grad_(False).eval()
    prompts = [torch.randint(2, 1024, (20,)).tolist() for _ in range(64)]
    seconds = median(
        lambda: sampling.sample(base, prompts, max_tokens=48, temperature=1.0, end_ids=(), pad_id=0)
    )
    with torch.no_grad():
        bare = median(lambda: base(torch.randint(2, 1024, (64, 68)), use_cache=False))
    show(
        "sampling, 64 rows",
        64 * 48 / seconds,
        "tokens/s",
        f"{seconds / bare:.0f} x one forward pass over them",
    )


def programs() -> None:
    """Measure how long a training program takes to start."""
    seconds = median(
        lambda: subprocess.run([sys.executable, "-c", "import tasks.programs.ppo"], check=True, cwd=ROOT),
        rounds=3,
        warmup=1,
    )
    show("start of a training program", seconds * 1000, "ms", "imports alone")


if __name__ == "__main__":
    training()
    comparing()
    sampler()
    programs()
    entries = [
        *data_benchmarks.beside_the_article(),
        *data_benchmarks.over_the_cores(),
        *training_benchmarks.beside_trl(),
        *ppo_benchmarks.beside_trl(),
    ]
    (ROOT / ".bench" / "bench.json").write_text(json.dumps(entries, indent=1) + "\n")
