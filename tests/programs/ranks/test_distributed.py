"""Test several processes per run: two ranks of torchrun take the steps of one process, and no rank outlives
another.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tasks.config.jobs import DpoJob, Job, PpoJob, ReferenceJob, RewardJob, SftJob
from tasks.config.machine import Machine
from tasks.execution import launch, program_environment, program_forks
from tasks.execution.launch import run_program
from tasks.execution.metrics_tail import Line
from tasks.programs import dpo, ppo, reference, reward, sft
from tasks.programs.runtime.program import Run
from tasks.system.errors import InputError, StageCrashed, StageFailed
from tests.support import fake_programs, forked, tiny
from tests.support.fake_programs import is_alive, wait_until
from tests.support.forked import Forked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with torchrun's agent"),
]

TEXT = {"max_prompt_tokens": 48, "max_answer_tokens": 24}
COMMON = {"lora": {"rank": 2, "alpha": 4}, "max_steps": 8, "epochs": 80, "learning_rate": 1e-3}
# 6 rollouts in mini-batches of 5 and 1, so one rank gets none of the second
PPO = {
    "lora": {"rank": 2, "alpha": 4},
    "steps": 8,
    "rollouts": 6,
    "answers_per_prompt": 3,
    "missing_eos": "add",
    "minibatch": 5,
    "learning_rate": 1e-3,
    "ptx": {"gradient_share": 0.5, "measured_steps": 5, "blocks": 3},
}
MIX = {
    "entropy_weight": 0.01,
    "rewards": {
        "functions": [{"name": "brevity", "function": "tests.programs.ppo.ppo_jobs:brevity", "weight": 0.1}],
        "running_normalisation": True,
    },
}
# stage, or algorithm of ppo -> its job, its inputs and the machine's settings; the ranks get unequal numbers
# of micro-batches, and in the reward model's steps one rank gets none
STAGES: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "sft": ({"sft": COMMON | {"batch_size": 3, "block_tokens": 96}}, ("data", "base"), {"micro_batch": 1}),
    "reward": (
        {"reward": COMMON | {"batch_size": 1, "members": 2, "comparisons": "rankings", "probe": True}},
        ("data", "model"),
        {},
    ),
    "dpo": ({"dpo": COMMON | {"batch_size": 3}}, ("data", "model", "reference"), {}),
    "ppo": ({"ppo": PPO | {"kl_target": 0.2, "kl_horizon": 30}}, ("data", "model", "reward"), {}),
    "rloo": (
        {"ppo": PPO | {"algorithm": "rloo", "steps": 4} | MIX},
        ("data", "model", "reward"),
        {"micro_batch": 1},
    ),
    "grpo": (
        {"ppo": PPO | {"algorithm": "grpo", "kl_penalty": "k3", "ptx": {"weight": 0.1, "blocks": 3}}},
        ("data", "model", "reward"),
        {},
    ),
}
PROGRAMS: dict[str, tuple[Callable[[Any, Run], None], type[Job]]] = {
    "sft": (sft.train, SftJob),
    "reward": (reward.train, RewardJob),
    "dpo": (dpo.train, DpoJob),
    "ppo": (ppo.train, PpoJob),
}
TWO = Machine.model_validate({"threads": 1, "launch": {"sft": {"processes": 2}}})


def ending_folder(folder: Path) -> Path:
    """Write an untrained model that ends its answers after 2 to 20 tokens."""
    model = tiny.model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[tiny.EOS] *= 32
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ranks")
    found = {"data": tiny.data_folder(root / "data"), "base": tiny.base_folder(root / "base")}
    found["model"] = ending_folder(root / "model")
    run = Run(
        tiny.write_job(
            root / "reference", "reference", {"text": TEXT}, {name: found[name] for name in ("data", "model")}
        )
    )
    reference.compute(ReferenceJob.model_validate(run.record), run)
    job = {"seed": 0, "text": TEXT, "reward": {"lora": {"rank": 2, "alpha": 4}, "max_steps": 4}}
    scorer = Run(
        tiny.write_job(root / "reward", "reward", job, {name: found[name] for name in ("data", "model")})
    )
    reward.train(RewardJob.model_validate(scorer.record), scorer)
    return found | {"reference": run.artifact, "reward": scorer.artifact}


def program_of(stage: str) -> str:
    return "ppo" if "ppo" in STAGES[stage][0] else stage


def prepared(
    folder: Path, stage: str, inputs: dict[str, Path], *, shard: bool = False, **changed: Any
) -> Path:
    job, names, machine = STAGES[stage]
    stage = program_of(stage)
    job = {
        stage: {
            name: value
            for name, value in (job[stage] | changed).items()
            if name != "members" or stage == "reward"
        }
    }
    machine = machine | {"launch": {stage: {"shard": shard}}}
    return tiny.write_job(
        folder,
        stage,
        {"seed": 5, "text": TEXT} | job,
        {name: inputs[name] for name in names},
        checkpoint_steps=3,
        **machine,
    )


def start(folder: Path, *program: str, ranks: int = 2) -> Forked:
    """Start a program by torchrun's agent."""
    agent = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return forked.start([*agent, *program], folder / "log.txt")


def run_by_two(stage: str, folder: Path) -> Path:
    assert start(folder, "-m", f"tasks.programs.{program_of(stage)}", str(folder)).wait(900) == 0, (
        folder / "log.txt"
    ).read_text()[-3000:]
    return folder / "artifact"


def run_here(stage: str, folder: Path) -> Path:
    train, job = PROGRAMS[program_of(stage)]
    run = Run(folder)
    train(job.model_validate(run.record), run)
    return run.artifact


def steps(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in (path.read_text() if path.exists() else "").split("\n")[:-1]]
    return [line for line in lines if "phase" not in line]


def contents(artifact: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(artifact)): path.read_bytes()
        for path in sorted(artifact.rglob("*"))
        if path.is_file()
    }


def children(pid: int) -> list[int]:
    return [child for child in launch._with_children(pid) if child != pid]


# Runs several programs one after another in the ranks of one torchrun, which imports torch once for all.
ONE_AFTER_ANOTHER = """
import contextlib, os, sys
from tasks.config import jobs
from tasks.programs import dpo, ppo, reward, sft
from tasks.programs.runtime.program import main
from tasks.rlhf.compute import distributed

leave, os._exit = os._exit, lambda status: None  # how a program's ranks end
with distributed.process_group():  # of all programs: torchrun's store takes the addresses of one only
    for argument in sys.argv[1:]:
        stage, sys.argv[1:] = argument.split("=")[0], argument.split("=")[1:]
        module = {"sft": sft, "reward": reward, "dpo": dpo, "ppo": ppo}[stage]
        main(module.train, getattr(jobs, f"{stage.capitalize()}Job"), among=contextlib.nullcontext)
leave(0)
"""
FULL_TUNING = {"tune": "full", "members": 1, "learning_rate": 1e-4}
RUNS = [*((stage, shard) for stage in ("sft", "reward", "dpo") for shard in (False, True))]
RUNS += [(algorithm, False) for algorithm in ("ppo", "rloo", "grpo")]
RUNS += [("ppo", True), ("rloo", True)]
KILLED = [("sft", False), ("sft", True), ("reward", False), ("dpo", False)]
KILLED += [("ppo", True), ("grpo", False)]
DROPOUT = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.1}, "max_steps": 30}
COMPARED = {"loss", "grad_norm", "held_out_loss", "reward", "kl", "policy_loss", "value_loss", "text_loss"}


def settings_of_sharded(stage: str) -> dict[str, Any]:
    return {} if program_of(stage) == "ppo" else FULL_TUNING


def settings_of_killed(stage: str, shard: bool) -> dict[str, Any]:
    if program_of(stage) == "ppo":
        return {}
    return DROPOUT | ({"tune": "full"} if shard else {})


def uninterrupted(root: Path, stage: str, shard: bool) -> Path:
    """Return the folder of the run that is not killed; PPO has no dropout: the first test's run is one."""
    return root / (f"{stage}-{shard}" if program_of(stage) == "ppo" else f"dropout-{stage}-{shard}")


@pytest.fixture(scope="module")
def by_two(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run by two ranks, without interruption, what the next two tests compare with."""
    root, arguments = tmp_path_factory.mktemp("two"), []
    for stage, shard in RUNS:
        folder = root / f"{stage}-{shard}"
        prepared(folder, stage, inputs, shard=shard, **(settings_of_sharded(stage) if shard else {}))
        arguments.append(f"{program_of(stage)}={folder}")
    for stage, shard in KILLED:
        folder = uninterrupted(root, stage, shard)
        if folder.exists():
            continue
        prepared(folder, stage, inputs, shard=shard, **settings_of_killed(stage, shard))
        arguments.append(f"{program_of(stage)}={folder}")
    (root / "programs.py").write_text(ONE_AFTER_ANOTHER)
    status = start(root, str(root / "programs.py"), *arguments).wait(900)
    assert status == 0, (root / "log.txt").read_text()[-3000:]
    return root


@pytest.fixture(scope="module")
def by_one(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Path]:
    """Return a function that runs a stage by one process, with or without full tuning, once."""

    @functools.cache
    def run(stage: str, is_full: bool) -> Path:
        folder = tmp_path_factory.mktemp("one") / stage
        return run_here(stage, prepared(folder, stage, inputs, **(FULL_TUNING if is_full else {})))

    return run


@pytest.mark.parametrize(("stage", "shard"), RUNS)
def test_two_processes_take_the_steps_of_one(
    stage: str, shard: bool, by_one: Callable[[str, bool], Path], by_two: Path
) -> None:
    one = by_one(stage, shard and program_of(stage) != "ppo")
    two = by_two / f"{stage}-{shard}" / "artifact"
    assert (two.parent / "done").exists()
    assert steps(one)[-1]["step"] == (4 if stage == "rloo" else 8)
    for ours, theirs in zip(steps(one), steps(two), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() & COMPARED:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=1e-5)
    files = [path.relative_to(one) for path in one.rglob("*.safetensors")]
    assert files == [path.relative_to(two) for path in two.rglob("*.safetensors")] != []
    for path in files:
        weights, others = load_file(one / path), load_file(two / path)
        assert weights.keys() == others.keys()
        assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-5
    # sharded weights answer no questions, unless they are frozen
    unsampled = {"samples.jsonl"} if shard and program_of(stage) != "ppo" else set()
    assert contents(two).keys() == contents(one).keys() - unsampled


@pytest.mark.parametrize(("stage", "shard"), KILLED)
def test_killed_in_mid_run_two_processes_end_as_uninterrupted_ones(
    stage: str, shard: bool, inputs: dict[str, Path], by_two: Path, tmp_path: Path
) -> None:
    killed = prepared(tmp_path / "killed", stage, inputs, shard=shard, **settings_of_killed(stage, shard))
    total = 8 if program_of(stage) == "ppo" else 30
    agent = start(killed, "-m", f"tasks.programs.{program_of(stage)}", str(killed))
    wait_until(lambda: len(steps(killed)) > 4 or agent.poll() is not None, every=0.002)
    workers = children(agent.pid)
    agent.kill()  # the agent alone: its workers must not stay behind
    agent.wait()
    assert len(workers) == 2
    wait_until(lambda: not any(map(is_alive, workers)))
    before = steps(killed)
    assert 4 < len(before) < total
    resumed = contents(run_by_two(stage, killed))
    assert steps(killed)[:3] == before[:3]  # wall-clock times and all: these steps were not taken again
    wanted = contents(uninterrupted(by_two, stage, shard) / "artifact")
    assert resumed.keys() == wanted.keys()
    assert {name for name in wanted if resumed[name] != wanted[name]} == set()


REFUSING = """
import sys
from tasks.programs import sft
from tasks.system.errors import InputError
from tasks.config.jobs import SftJob
from tasks.programs.runtime.program import main
from tasks.rlhf.compute import distributed

honest = sft.measure_packing_leak

def refusing(*given):
    if distributed.rank() == 1:
        raise InputError("Rank 1 does not like it.")
    return honest(*given)

sft.measure_packing_leak = refusing
main(sft.train, SftJob, among=distributed.process_group)
"""


def test_what_one_rank_refuses_ends_all_in_its_own_words(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = prepared(tmp_path / "refused", "sft", inputs)
    (tmp_path / "refusing.py").write_text(REFUSING)
    agent = start(folder, str(tmp_path / "refusing.py"), str(folder))
    wait_until(lambda: (folder / "error.json").exists() or agent.poll() is not None)
    workers = children(agent.pid)
    assert agent.wait(900) == 1
    assert json.loads((folder / "error.json").read_text()) == {
        "input": True,
        "disk": False,
        "message": "Rank 1 does not like it.",
    }
    assert not any(map(is_alive, workers))
    assert not (folder / "done").exists()


# ----------------------------------------------------------------------- what the ranks do together

TOGETHER = """
import torch
from torch import nn
from tasks.rlhf.compute import distributed
from tasks.rlhf.compute.seeds import seed_step
from tasks.system.errors import InputError

with distributed.process_group():
    rank = distributed.rank()
    assert distributed.world() == 3 and distributed.is_first() == (rank == 0)
    distributed.BUCKET = 40  # some in the same, some apart
    sizes = [((2, 3), torch.float32), (4, torch.float32), (5, torch.float32), (30, torch.bfloat16)]
    p = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size, dtype in sizes]
    p[0].grad = torch.arange(6.0).reshape(2, 3) * (rank + 1)
    if rank == 2:
        p[1].grad = torch.full((4,), 7.0)
    # in bfloat16 256 + 1 - 256 is 0
    p[3].grad = torch.tensor([256.0, 1.0, -256.0]).roll(rank).repeat(10).bfloat16()
    distributed.sum_gradients(p)
    assert torch.equal(p[0].grad, torch.arange(6.0).reshape(2, 3) * 6)
    assert torch.equal(p[1].grad, torch.full((4,), 7.0))
    assert p[2].grad is None
    assert torch.equal(p[3].grad, torch.ones(30, dtype=torch.bfloat16))

    assert distributed.rank_slice(list(range(8))) == [[0, 3, 6], [1, 4, 7], [2, 5]][rank]
    assert distributed.rank_slice(torch.arange(2)).tolist() == [[0], [1], []][rank]
    computed = []
    doubled = distributed.map_over_ranks([10, 20, 30, 40], lambda x: computed.append(x) or 2 * x)
    assert doubled == [20, 40, 60, 80]
    assert computed == [[10, 40], [20, 10], [30, 10]][rank]  # all are called as often
    assert distributed.padded_steps([1] * rank, 9) == [(1, True)] * rank + [(9, False)] * (2 - rank)
    assert distributed.map_over_ranks([], float) == []
    assert distributed.all_reduce([rank, 0.5]) == [3.0, 1.5]
    seed_step(1, 2, rank=rank)
    drawn = distributed.map_over_ranks(range(3), lambda _: torch.rand(1).item())
    assert len(set(drawn)) == 3
    seed_step(1, 2)
    assert torch.rand(1).item() == drawn[0]
    assert distributed.check_equal(5, "fives") == 5
    try:
        distributed.check_equal(rank, "ranks")
    except InputError as error:
        assert "different ranks" in str(error)
    else:
        raise AssertionError
"""


def test_sums_shares_and_agreement_of_three(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    assert start(tmp_path, str(tmp_path / "together.py"), ranks=3).wait(900) == 0, (
        tmp_path / "log.txt"
    ).read_text()[-3000:]


LOST = """
import os, signal, sys
from pathlib import Path
from tasks.system import torchrun
from tasks.rlhf.compute import distributed

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would end the other first
try:
    with distributed.process_group():
        distributed.barrier()
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.barrier()
except torchrun.PeersLost:
    Path(sys.argv[1]).write_text("")
"""


def test_a_rank_that_has_lost_another_knows_it(tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(LOST)
    assert start(tmp_path, str(tmp_path / "lost.py"), str(tmp_path / "lost")).wait(900) == 1
    assert (tmp_path / "lost").exists(), (tmp_path / "log.txt").read_text()[-3000:]


# A frozen base, as in PPO: ranks with other numbers of rows, whose answers end at other times.
FROZEN = """
import sys
from pathlib import Path
from tasks.rlhf.algorithms.sanity_checks import digest
from tasks.rlhf.batches import sampling, sequences
from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import loading, lora, quantised
from tests.support import tiny
import torch
from torch.distributed.tensor import DTensor

prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14], [15, 16]]
uniform = torch.rand(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
limits = {"max_tokens": 12, "temperature": 1.0, "end_ids": list(range(100)), "pad_id": 0}

def attach(model, name, targets):
    model = lora.attach(model, name, lora.build_config(rank=2, alpha=4, dropout=0.0, targets=targets))
    trained = lora.parameters(model, name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained.values():
            p.copy_(torch.randn(p.shape, generator=generator) / 10)
    return model, trained

def check_frozen_base():
    own = slice(0, 1) if distributed.is_first() else slice(1, 5)
    for precision in (None, "nf4", "int8"):
        whole, parts = (
            loading.load(Path(sys.argv[1]), device=tiny.CPU, precision=precision) for _ in range(2)
        )
        with quantised.kept_attributes(parts):
            fsdp.shard(parts, tiny.CPU)
        local = parts.model.layers[0].mlp.up_proj.weight.to_local()
        assert 2 * local.numel() == whole.model.layers[0].mlp.up_proj.weight.numel()
        assert digest(parts.parameters()) == digest(whole.parameters())
        calls = []
        parts.get_decoder().register_forward_pre_hook(lambda *_: calls.append(1))
        adapters = {"policy": "all-linear", "critic": ("q_proj",)}
        for name, targets in adapters.items():  # the second after the first forward pass
            (one, trained), (many, shared) = (attach(model, name, targets) for model in (whole, parts))
            whole, parts = one, many
            with lora.active(one, name) as model:
                wanted = sampling.sample(model, prompts, uniform=uniform, **limits)
                answers = [ids[mask].tolist() for ids, mask in zip(wanted.ids, wanted.mask)]
                batch = sequences.join(prompts, answers, pad_id=0, device=tiny.CPU)
                logp = sequences.log_probs(model, batch)
                logp.sum().backward()
            lengths = [len(answer) for answer in answers]
            assert lengths[0] < max(lengths[1:])
            calls.clear()
            with lora.active(many, name) as model:
                found = fsdp.with_full_weights(
                    model, sampling.sample, prompts[own], uniform=uniform[own], **limits
                )
                assert [ids[mask].tolist() for ids, mask in zip(found.ids, found.mask)] == answers[own]
                assert len(calls) == max(lengths)
                sequences.MIN_GROUP_ROWS = 1  # so that the second rank calls it more often
                rows = batch.rows(torch.arange(5)[own])
                ours = fsdp.with_full_weights(model, sequences.log_probs, rows)
                ours.sum().backward()
                assert len(calls) == max(lengths) + 4
                sequences.MIN_GROUP_ROWS = 16
            torch.testing.assert_close(ours, logp[own, : ours.shape[1]], rtol=1e-5, atol=1e-5)
            distributed.sum_gradients(shared.values())
            for (key, p), q in zip(trained.items(), shared.values(), strict=True):
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
        base = {name: p for name, p in many.named_parameters() if ".lora_" not in name}
        assert len(base) > 9 and all(isinstance(p, DTensor) for p in base.values())
"""

SHARDED = """
import os
import sys
sys.path.insert(0, "tests")
from tests.support import tiny
import torch
from torch.distributed.tensor import DTensor
from tasks.rlhf.models import gradient_checkpointing
from tasks.rlhf.batches import shared_prompt
from tasks.rlhf.batches import chunked_log_probs
from tasks.rlhf.batches import forward
from tasks.rlhf.compute import distributed
from tasks.rlhf.compute import fsdp

ids = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(1))

def loss(model, rows):
    hidden = forward.hidden_states(model, ids[rows])[:, :-1].flatten(0, 1)
    targets = ids[rows][:, 1:].flatten()
    return chunked_log_probs.cross_entropy(hidden, forward.output_head(model), targets, count=76)

with distributed.process_group():
    for kind in ("llama", "qwen2", "gpt2"):  # the first and the last with tied embeddings
        alone, parts = (tiny.model(kind).requires_grad_(True) for _ in range(2))
        gradient_checkpointing.enable(parts)
        fsdp.shard(parts, tiny.CPU)
        loss(alone, slice(None)).backward()
        fsdp.with_full_weights(parts, loss, slice(distributed.rank(), None, 2)).backward()
        distributed.sum_gradients(parts.parameters())  # nothing to do
        wanted = dict(alone.named_parameters())
        assert dict(parts.named_parameters()).keys() == wanted.keys()
        assert all(isinstance(p, DTensor) for p in parts.parameters())
        for name, p in parts.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), wanted[name].grad, rtol=1e-4, atol=1e-6)
        extra = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
        for p in extra:
            p.grad = torch.full((3,), 2.0)
        both = zip((alone, parts), extra)
        norms = [fsdp.clip_grad_norm([*model.parameters(), p], 0.1) for model, p in both]
        assert abs(norms[0] - norms[1]) < 1e-4 * norms[0]
        assert abs(fsdp.clip_grad_norm([*parts.parameters(), extra[1]], 9) - 0.1) < 1e-4
        torch.testing.assert_close(*[p.grad for p in extra])

        with torch.no_grad():
            before = fsdp.with_full_weights(parts, loss, slice(None)).item()
            for name, p in parts.named_parameters():
                p.copy_(fsdp.shard_like(wanted[name] / 2, p))
                wanted[name].div_(2)
            whole = loss(alone, slice(None))
            assert abs(fsdp.with_full_weights(parts, loss, slice(None)) - whole) < 1e-5, kind
            assert abs(before - loss(alone, slice(None))) > 1e-2, (before, loss(alone, slice(None)))
        long, short = ([5] * 60, [[6, 7] * 34]), ([5] * 30, [[6, 7] * 20])
        asked = [[long] * 4 + [short] * 4, [short]]
        joined = [shared_prompt.join(some, pad_id=0, device=tiny.CPU, hidden_size=32) for some in asked]
        # one rank calls the model more often than the other
        assert [len(batch.groups) for batch in joined] == [2, 1]
        for p in [*alone.parameters(), *parts.parameters()]:
            p.grad = None
        first, second = (shared_prompt.log_probs(alone, batch).sum() for batch in joined)
        (first + second).backward()
        fsdp.with_full_weights(parts, shared_prompt.log_probs, joined[distributed.rank()]).sum().backward()
        for name, p in parts.named_parameters():
            torch.testing.assert_close(p.grad.full_tensor(), wanted[name].grad, rtol=1e-3, atol=1e-4)
        found = fsdp.gather_full(dict(parts.named_parameters()))
        assert not distributed.is_first() or all(torch.equal(found[name], wanted[name]) for name in wanted)
    check_frozen_base()
os._exit(0)  # as programs do
"""


def test_losses_and_gradients_of_weights_in_parts_are_those_of_whole_ones(tmp_path: Path) -> None:
    base = tiny.base_folder(tmp_path / "base")
    (tmp_path / "in_parts.py").write_text(FROZEN + SHARDED)
    agent = start(tmp_path, str(tmp_path / "in_parts.py"), str(base))
    assert agent.wait(900) == 0, (tmp_path / "log.txt").read_text()[-3000:]


def test_bottlenecks_cannot_be_sharded(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="set tune to lora or full, or shard to false"):
        run_here("dpo", prepared(tmp_path / "bottleneck", "dpo", inputs, shard=True, tune="bottleneck"))


# ------------------------------------------------------------------------------------------- launch


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = fake_programs.make_tree(tmp_path / "tree")
    monkeypatch.setattr(program_environment, "ROOT", made)
    yield made
    program_forks.stop()


def written(tree: Path, tmp_path: Path, code: str) -> Path:
    """Create a program of this code in a folder."""
    (tree / "tasks" / "programs" / "sft.py").write_text(
        "import os, time\nfrom pathlib import Path\nRANK = os.environ['RANK']\n" + code
    )
    made = tmp_path / "work"
    made.mkdir()
    (made / "job.json").write_text("{}")
    return made


def test_a_stage_is_started_as_several_processes_and_their_memory_is_summed(
    tree: Path, tmp_path: Path
) -> None:
    code = (
        "kept = bytearray(200 << 20)\nkept[::4096] = b'x' * len(kept[::4096])\nprint('I am', RANK)\n"
        "time.sleep(0.5)\n"
    )
    code += (
        "Path('threads' + RANK).write_text(os.environ['OMP_NUM_THREADS'])\nif RANK == '0': "
        "Path('done').write_text('')\n"
    )
    directory = written(tree, tmp_path, code)
    usage = run_program("sft", directory, TWO)
    assert [(directory / f"threads{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert usage.peak_mb > 400
    log = (directory / "log.txt").read_text()
    assert "I am 0" in log
    assert "I am 1" in log


def test_a_killed_rank_is_a_crash_of_them_all(tree: Path, tmp_path: Path) -> None:
    code = "Path('started').touch()\nPath('pid' + RANK).write_text(str(os.getpid()))\n"
    code += "while not Path('pid0').exists(): time.sleep(0.01)\n"
    directory = written(tree, tmp_path, code + "if RANK == '1': os.kill(os.getpid(), 9)\ntime.sleep(600)\n")
    with pytest.raises(StageCrashed, match="sft failed: killed by SIGKILL"):
        run_program("sft", directory, TWO)
    assert not is_alive(int((directory / "pid0").read_text()))


def test_an_import_that_fails_in_every_rank_is_told_and_is_no_crash(tree: Path, tmp_path: Path) -> None:
    directory = written(tree, tmp_path, "from json import no_such_name\n")
    with pytest.raises(
        StageFailed, match="sft failed: ImportError: cannot import name 'no_such_name'"
    ) as told:
        run_program("sft", directory, TWO)
    assert not isinstance(told.value, StageCrashed)


def test_whatever_is_raised_meanwhile_all_ranks_are_killed(tree: Path, tmp_path: Path) -> None:
    code = (
        "from tasks.system import processes\nprocesses.die_with_parent()\nPath('pid' + "
        "RANK).write_text(str(os.getpid()))\n"
    )
    code += (
        "while not all(Path(name).exists() and Path(name).read_text() for name in ('pid0', 'pid1')): "
        "time.sleep(0.01)\nif RANK == '0': Path('metrics.jsonl').write_text('{\"step\": 1}\\n')\n"
        "time.sleep(600)\n"
    )
    directory = written(tree, tmp_path, code)

    def interrupt(line: Line) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_program("sft", directory, TWO, on_step=interrupt)
    wait_until(lambda: not any(is_alive(int((directory / name).read_text())) for name in ("pid0", "pid1")))


def test_a_program_for_one_process_refuses_to_be_several(tree: Path, tmp_path: Path) -> None:
    directory = tmp_path / "work"  # the tree's own program
    directory.mkdir()
    (directory / "job.json").write_text("{}")
    with pytest.raises(InputError, match="This program is one process, and 2 were started"):
        run_program("sft", directory, TWO)


def test_nodes_meet_at_a_rendezvous(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs rendezvous, as host:port"):
        Machine.model_validate({"launch": {"sft": {"nodes": 2}}})
    machine = Machine.model_validate(
        {"launch": {"sft": {"nodes": 2, "processes": 8}}, "rendezvous": "node0:29500"}
    )
    command = " ".join(launch._torchrun("sft", tmp_path / "key", machine))
    assert (
        "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node0:29500 --rdzv-id key --nproc-per-node 8 "
        "-m tasks.programs.sft"
    ) in command
    assert machine.of("ppo").processes == 1
