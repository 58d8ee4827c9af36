"""Measure SFT, reward model and DPO steps beside TRL's, with the same model, weights, texts and batches.

python -m tests.benchmarks.training
python -m tests.benchmarks.training WORKLOAD float32|bfloat16 FOLDER    one round of our side alone
"""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tasks.config.sections.dpo import Dpo
from tasks.programs.dpo import pair_loss
from tasks.programs.reference import log_probs
from tasks.programs.token_tables.questions import decode, to_batch
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.algorithms import losses
from tasks.rlhf.batches import comparisons, shared_prompt
from tasks.rlhf.batches.comparisons import Batch, Comparison
from tasks.rlhf.batches.packing import IGNORE, Document, block_loss, first_fit, pack
from tasks.rlhf.compute import devices, seeds
from tasks.rlhf.models import loading, lora
from tests.benchmarks.peer_environments import create_environment
from tests.support.paths import ROOT

PEER, PEER_NAME = ROOT / ".bench" / "trl-peer", "TRL 1.16.0"
PEER_NEEDS = (
    "trl==1.16.0",
    "transformers==5.23.0",
    "torch==2.13.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "datasets==5.2.0",
)
SKIP, STEPS = 3, 20  # steps before the clock starts, and under it
TOTAL = SKIP + STEPS
WORK: dict[str, Any] = {
    "rank": 8,
    "alpha": 32,
    "targets": ["q_proj", "v_proj"],
    "learning_rate": 3e-4,
    "beta": 0.1,
    "block_tokens": 256,
}
ONE, THREE, RANKED = [(0, 1)], [(0, 1), (2, 3), (4, 5)], list(combinations(range(5), 2))
ASKED = {
    "pairwise": (3, THREE),
    "pairwise-1": (8, ONE),
    "kwise": (2, RANKED),
    "dpo": (3, THREE),
    "dpo-1": (8, ONE),
}  # questions a step, pairs of each
SCORED, COMPARED = ("pairwise", "pairwise-1", "kwise"), ("dpo", "dpo-1")
NAMES = {
    "sft": ("SFT step, packed blocks of 256 tokens", "tokens/s"),
    "pairwise": ("reward step, 3 questions of 3 pairs", "pairs/s"),
    "pairwise-1": ("reward step, 8 questions of one pair", "pairs/s"),
    "kwise": ("reward step, 2 questions of 5 ranked answers", "pairs/s"),
    "dpo": ("DPO step, 3 questions of 3 pairs", "pairs/s"),
    "dpo-1": ("DPO step, 8 questions of one pair", "pairs/s"),
}


def beside_trl(rounds: int = 3) -> list[dict[str, Any]]:
    """Measure every workload in fp32 and bf16, ours and TRL in turn, each round in a process of its own.

    In bf16 both load a bf16 model and train adapters in fp32, which is peft's way; TRL computes under
    autocast, which is its default. DPO's reference pass is in the steps of both.
    """
    python = create_environment(PEER, PEER_NEEDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_workloads(folder)
        return [
            _beside(python, what, dtype, folder, rounds)
            for dtype in ("float32", "bfloat16")
            for what in NAMES
        ]


def _beside(python: Path, what: str, dtype: str, folder: Path, rounds: int) -> dict[str, Any]:
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_round([sys.executable, "-m", "tests.benchmarks.training"], what, dtype, folder))
        theirs.append(
            _round(
                [str(python), str(ROOT / "tests" / "benchmarks" / "peer_training.py")], what, dtype, folder
            )
        )
    both = list(zip(ours, theirs, strict=True))
    runs = [
        {
            "ours": a["rate"],
            "peer": b["rate"],
            "ratio": a["rate"] / b["rate"],
            "cpu_ratio": b["cpu"] / a["cpu"],
        }
        for a, b in both
    ]
    middle = {
        key: statistics.median(run[key] for run in runs) for key in ("ours", "peer", "ratio", "cpu_ratio")
    }
    apart = [abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True)]
    same = {
        "loss_ours": ours[0]["losses"][-1],
        "loss_peer": theirs[0]["losses"][-1],
        "first_apart": apart[0],
        "mean_apart": statistics.mean(apart),
    }
    title, unit = NAMES[what]
    rates = (
        f"{middle['ours']:>9,.1f} {unit:<9} {middle['ratio']:.2f} x {PEER_NAME} ({middle['peer']:,.1f}), "
        f"{middle['cpu_ratio']:.2f} x by CPU time"
    )
    note = (
        f"last loss {same['loss_ours']:.4f} and {same['loss_peer']:.4f}, {same['mean_apart']:.0e} apart a "
        "step"
    )
    print(f"{title + ', ' + dtype:<56} {rates}; {note}", flush=True)
    return (
        {"what": title, "unit": unit, "dtype": dtype, "peer_name": PEER_NAME} | middle | {"runs": runs} | same
    )


def _round(command: list[str], what: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Run one process; return units a second of the median step after the first, CPU seconds, and the
    losses.
    """
    threads = {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "10000"}  # as the stages' programs are started
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*command, what, dtype, folder],
        cwd=ROOT,
        env=os.environ | threads | quiet,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command}: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    units, ends = json.loads((folder / "work.json").read_text())["units"][what], found["ends"]
    wall, cpu = (
        seconds / len(ends) for seconds in found.get("reference", (0.0, 0.0))
    )  # of the pass before the steps, each step's share
    rates = [
        unit / (end - before + wall) for unit, (before, end) in zip(units[1:], pairwise(ends), strict=True)
    ][SKIP - 1 :]
    return found | {
        "rate": statistics.median(rates),
        "cpu": found["used"][-1] - found["used"][SKIP - 1] + STEPS * cpu,
    }


def write_workloads(folder: Path) -> None:
    """Write the model in both types, the adapters' first weights, and the texts that both sides read."""
    model, tokenizer = build_base()
    for dtype in ("float32", "bfloat16"):
        model.to(getattr(torch, dtype)).save_pretrained(folder / dtype)
        tokenizer.save_pretrained(folder / dtype)
    wrapped = lora.attach(model.float(), "first", _lora())
    first = {_place(name): p.detach().clone() for name, p in wrapped.named_parameters() if ".lora_A." in name}
    save_file(
        first | {"score": lora.new_head(model.config.hidden_size).weight.detach()},
        folder / "start.safetensors",
    )
    draw = random.Random(0)
    tokens = _write_documents(draw, folder / "sft.json")
    for what in ASKED:
        (folder / f"{what}.json").write_text(
            json.dumps([_question(draw, ASKED[what][1]) for _ in range(ASKED[what][0] * TOTAL)])
        )
    pairs = {what: questions * len(each) for what, (questions, each) in ASKED.items()}
    record = {
        "steps": TOTAL,
        "batch": {"sft": 8} | pairs,
        "units": {"sft": tokens} | {what: [each] * TOTAL for what, each in pairs.items()},
    }
    (folder / "work.json").write_text(json.dumps(WORK | record))


def build_base() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return the random Llama of 7M parameters that both sides train on, with a tokenizer of words."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{number}": number for number in range(3, 4096)}
    raw = Tokenizer(WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=1)
    )
    return model, tokenizer


def _write_documents(draw: random.Random, path: Path) -> list[int]:
    """Write documents, and the blocks that our SFT packs them in, in TRL's form; return the tokens of each
    step.
    """
    documents = [[*_words(draw, 20, 120), 1] for _ in range(TOTAL * 8 * 4)]
    bins = first_fit([len(ids) for ids in documents], WORK["block_tokens"])[: TOTAL * 8]
    parts = [[documents[index] for index in members] for members in bins]
    blocks = [
        {"input_ids": [token for ids in part for token in ids], "seq_lengths": [len(ids) for ids in part]}
        for part in parts
    ]
    path.write_text(json.dumps({"documents": documents, "blocks": blocks}))
    lengths = [len(block["input_ids"]) for block in blocks]
    return [sum(lengths[first : first + 8]) for first in range(0, len(lengths), 8)]


def _words(draw: random.Random, low: int, high: int) -> list[int]:
    return [draw.randint(3, 4095) for _ in range(draw.randint(low, high))]


def _question(draw: random.Random, pairs: list[tuple[int, int]]) -> dict[str, Any]:
    """Return a prompt of 60 words, answers of 20 to 60, and which are compared, the better one first."""
    answers = 1 + max(max(pair) for pair in pairs)
    prompt, *rest = (
        " ".join(f"w{word}" for word in _words(draw, *size)) for size in [(60, 60)] + [(20, 60)] * answers
    )
    return {"prompt": prompt, "answers": rest, "pairs": pairs}


def _lora() -> LoraConfig:
    return lora.build_config(
        rank=WORK["rank"], alpha=WORK["alpha"], dropout=0.0, targets=tuple(WORK["targets"])
    )


def _place(name: str) -> str:
    """Return where in the model an adapter's weight sits, without the names of its wrappers."""
    found = re.search(r"(layers\..*)\.lora_", name)
    assert found
    return found[1]


def our_round(what: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Take the optimizer steps that the programs take, over all batches of a workload."""
    device = devices.set_up("cpu", int(os.environ["OMP_NUM_THREADS"]))
    base = loading.load(folder / dtype, device=device)
    model = lora.attach(base, what, _lora())
    parameters: dict[str, nn.Parameter] = lora.parameters(model, what)
    first = load_file(folder / "start.safetensors")
    for name, parameter in parameters.items():
        if ".lora_A." in name:
            parameter.data.copy_(first[_place(name)])
    head = lora.new_head(base.config.hidden_size)
    head.weight.data.copy_(first["score"])
    head.bias.requires_grad_(False)
    if what in SCORED:
        parameters["head.weight"] = next(head.parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=WORK["learning_rate"], weight_decay=0.0, fused=True)
    started = time.perf_counter(), time.process_time()
    loss_of = _sft_loss(model, folder) if what == "sft" else _pairs_loss(model, head, what, folder)
    reference = (
        [now - then for now, then in zip((time.perf_counter(), time.process_time()), started, strict=True)]
        if what in COMPARED
        else [0.0, 0.0]
    )
    lora.train_mode(model)
    ends, used, seen = [], [], []
    steps = json.loads((folder / "work.json").read_text())["steps"]
    for step in range(steps):
        seeds.seed_step(0, step + 1)
        optimizer.zero_grad(set_to_none=True)
        with lora.active(model, what) as policy:
            loss = loss_of(policy, step)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        seen.append(loss.item())
        ends.append(time.perf_counter())
        used.append(time.process_time())
    types = {
        name.split(".")[-3]: str(p.dtype).removeprefix("torch.")
        for name, p in parameters.items()
        if "lora_" in name
    }
    return {"ends": ends, "used": used, "losses": seen, "types": types, "reference": reference}


LossOf = Callable[[PreTrainedModel, int], Tensor]


def _sft_loss(model: PeftModel, folder: Path) -> LossOf:
    documents = [
        Document(ids, [True] * len(ids)) for ids in json.loads((folder / "sft.json").read_text())["documents"]
    ]
    blocks = pack(documents, block_tokens=WORK["block_tokens"], pad_id=0)

    def loss_of(policy: PreTrainedModel, step: int) -> Tensor:
        chosen = torch.arange(step * 8, step * 8 + 8)
        return block_loss(
            policy, blocks, chosen, torch.device("cpu"), count=int((blocks.labels[chosen] != IGNORE).sum())
        )

    return loss_of


def _pairs_loss(model: PeftModel, head: nn.Linear, what: str, folder: Path) -> LossOf:
    """Return the loss of a batch of pairs; for DPO the reference's log-probabilities are computed first, as
    its stage does.
    """
    tokenizer, (questions, _) = loading.load_tokenizer(folder / "float32"), ASKED[what]
    asked = []
    for number, row in enumerate(json.loads((folder / f"{what}.json").read_text())):
        ids = [tokenizer(text)["input_ids"] for text in (row["prompt"], *row["answers"])]
        answers, pairs = (
            [[*answer, tokenizer.eos_token_id] for answer in ids[1:]],
            [(w, x) for w, x in row["pairs"]],
        )
        asked.append(Comparison(number, ids[0], answers, pairs, [1.0] * len(pairs), [None] * len(pairs)))
    plain = Dpo(beta=WORK["beta"], nll_weight=0.0)

    def collated(step: int) -> Batch:
        part = asked[step * questions : (step + 1) * questions]
        return comparisons.collate(
            part, pad_id=0, device=torch.device("cpu"), hidden_size=model.config.hidden_size
        )

    reference: dict[int, list[float]] = {}
    if what in COMPARED:
        with lora.active(model, None) as base:
            table = TokenTable([to_batch(asked)], decode)
            reference = log_probs(base, table, pad_id=0, report_progress=lambda done, total: None)

    def dpo_loss(policy: PreTrainedModel, step: int) -> Tensor:
        batch, part = collated(step), asked[step * questions : (step + 1) * questions]
        ref = torch.tensor([value for c in part for value in reference[c.question_id]])
        return pair_loss(shared_prompt.log_probs(policy, batch.inputs), ref, batch, plain).loss.mean()

    def reward_loss(policy: PreTrainedModel, step: int) -> Tensor:
        batch = collated(step)
        score = shared_prompt.scores(policy, head, batch.inputs)
        return losses.pairwise_loss(score[batch.chosen], score[batch.rejected]).mean()

    return dpo_loss if what in COMPARED else reward_loss


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(our_round(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
    else:
        beside_trl()
