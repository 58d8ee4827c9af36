"""Test estimates of memory: arithmetic by hand, what torch allocates, and what a refusal says."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tasks.config.sections.sft import Sft
from tasks.programs.runtime import training_setup
from tasks.programs.runtime.program import Run
from tasks.rlhf.batches import chunked_log_probs, forward
from tasks.rlhf.batches.attention_masks import Segments
from tasks.rlhf.compute import cpu_attention, free_memory
from tasks.rlhf.compute.free_memory import available
from tasks.rlhf.models import gradient_checkpointing, lora
from tasks.rlhf.training import dry_run, memory
from tasks.rlhf.training.dry_run import StepSpec
from tasks.rlhf.training.memory import Estimate, check_fits, estimate, format_estimate
from tasks.system.errors import InputError
from tests.support import attention_models, forked, tiny

SEVEN = LlamaConfig(
    dtype="bfloat16"
)  # transformers' defaults are Llama 7B: 32 layers of 4096 x 4096 and 4096 x 11008, 32000 tokens, untied
SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
CUDA = torch.device("cuda")
FULL = StepSpec(SMALL, rows=4, tokens=64, device=CUDA)
LORA = FULL._replace(rank=4)
DEEP = LORA._replace(config=LlamaConfig.from_dict(SMALL.to_dict() | {"num_hidden_layers": 12}), chunk=16)


# ------------------------------------------------------------------------------------------ counted


@pytest.mark.parametrize(
    ("change", "weights"),
    [
        ({}, 6_738_415_616 * 2),
        ({"precision": "float32"}, 6_738_415_616 * 4),
        (
            {"precision": "int8"},
            6_476_005_376 + 32 * 42_496 * 4 + 262_410_240 * 2,
        ),  # matrices, a scale a row, the rest in bfloat16
        ({"precision": "nf4"}, 3_238_002_688 + 101_187_584 + 395_264 * 4 + 262_410_240 * 2),  # 3.87 GB
        ({"precision": "nf4", "double_quantised": False}, 3_238_002_688 + 101_187_584 * 4 + 262_410_240 * 2),
    ],
)
def test_a_7b_model_by_hand(change: dict[str, Any], weights: int) -> None:
    counted = memory._persistent(StepSpec(SEVEN, rows=1, tokens=128, rank=16, num_adapters=2, **change))
    one = (
        4 * 16 * 32 * (4 * 8192 + 3 * 15_104)
    )  # float32; rank times (inputs + outputs) of seven matrices in 32 layers
    assert counted[:4] == (weights, 2 * one, 2 * one, 4 * one)


def test_training_every_weight_keeps_four_copies() -> None:
    counted = memory._persistent(FULL)
    num = 512 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176 + 2 * 64) + 64  # the head is the embedding
    assert counted[:4] == (4 * num, 0, 4 * num, 8 * num)


def test_a_quantised_base_cannot_train() -> None:
    with pytest.raises(AssertionError, match="cannot train"):
        estimate(FULL._replace(precision="nf4"))


# ---------------------------------------------------------------------------------------- rehearsed


def real(spec: StepSpec) -> int:
    """The most bytes that torch had allocated at once in a forward and backward pass, on this machine.

    With a specification for a GPU attention is computed as there.
    """
    on_cpu = spec.device.type == "cpu"
    AttentionInterface.register("sdpa", cpu_attention.attend if on_cpu else sdpa_attention_forward)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(spec.config), dtype=torch.bfloat16 if spec.precision == "bfloat16" else torch.float32
    )
    model.requires_grad_(False).eval()
    if spec.checkpointing:
        gradient_checkpointing.enable(model)
    ids = torch.randint(spec.config.vocab_size, (spec.rows, spec.tokens))
    places = segments = None
    if spec.packed:
        places = torch.arange(spec.tokens).remainder(spec.tokens // 2).expand(spec.rows, -1)
    elif spec.explicit_mask:
        places = torch.arange(spec.tokens).expand(spec.rows, -1)
        segments = Segments(torch.zeros_like(ids), torch.zeros_like(ids))
    with dry_run.training_model(model, spec) as base:
        for parameter in base.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        with allocations() as sizes:
            hidden = forward.hidden_states(base, ids, places, segments).flatten(0, 1)
            loss = chunked_log_probs.cross_entropy(
                hidden, forward.output_head(base), ids.flatten(), count=1, chunk=spec.chunk
            )
            del hidden
            loss.backward()
    return max(sizes)


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Return the bytes allocated since the beginning, after each allocation."""
    sizes = [0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield sizes
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        sizes.append(sizes[-1] + event.nbytes())


def config(kind: str) -> PretrainedConfig:
    return tiny.model(kind).config


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")
@pytest.mark.parametrize(
    "spec",
    [
        FULL,
        LORA,
        LORA._replace(rank=32),  # folded
        FULL._replace(checkpointing=True),
        LORA._replace(checkpointing=True, rows=16),
        LORA._replace(dropout=0.1),
        LORA._replace(packed=True),
        FULL._replace(explicit_mask=True),
        LORA._replace(
            explicit_mask=True,
            chunk=32,
            config=LlamaConfig.from_dict(
                SMALL.to_dict() | {"num_attention_heads": 8, "intermediate_size": 32}
            ),
        ),
        LORA._replace(chunk=32),
        FULL._replace(precision="bfloat16"),
        LORA._replace(precision="bfloat16"),
        FULL._replace(precision="bfloat16", device=tiny.CPU),
        LORA._replace(precision="bfloat16", device=tiny.CPU),
        LORA._replace(precision="bfloat16", device=tiny.CPU, explicit_mask=True),
        *(LORA._replace(config=config(kind)) for kind in tiny.ARCHITECTURES),
        *(FULL._replace(config=config(kind)) for kind in tiny.ARCHITECTURES),
    ],
    ids=lambda spec: ", ".join(
        [
            spec.config.model_type,
            *(f"{k}={v}" for k, v in spec._asdict().items() if k != "config" and v and v != CUDA),
        ]
    ),
)
def test_a_rehearsal_finds_what_torch_allocates(spec: StepSpec) -> None:
    assert sum(dry_run.measure_transient(spec)) == pytest.approx(dry_run.SLACK * real(spec), rel=0.05)


SCRIPT = """
import sys
from pathlib import Path
from tests.rlhf.training import test_memory
from tasks.rlhf.compute import free_memory
if sys.argv[1] == "True":
    free_memory.map_large_tensors()
spec = test_memory.LORA._replace(rows=32, tokens=256)
test_memory.step(spec._replace(rows=1, tokens=8))  # kernels are there now
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = test_memory.peak()
test_memory.step(spec)
print(test_memory.peak() - before)
"""


def peak() -> int:
    """Return the most bytes that this process ever held."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return 1024 * int(line.split()[1])


def step(spec: StepSpec) -> None:
    """Two micro-batches and an optimizer step."""
    model = LlamaForCausalLM(spec.config).requires_grad_(False).eval()
    peft = lora.attach(
        model, "x", lora.build_config(rank=spec.rank or 1, alpha=1, dropout=0, targets="all-linear")
    )
    parameters = lora.parameters(peft, "x").values()
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for _ in range(2):
        ids = torch.randint(spec.config.vocab_size, (spec.rows, spec.tokens))
        with lora.active(peft, "x") as base:
            hidden = forward.hidden_states(base, ids).flatten(0, 1)
            chunked_log_probs.cross_entropy(
                hidden, forward.output_head(base), ids.flatten(), count=1
            ).backward()
    optimizer.step()


@pytest.mark.parametrize("mapped", [False, True])
def test_a_process_takes_what_is_told(mapped: bool, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    script = forked.start([str(tmp_path / "script.py"), str(mapped)], tmp_path / "log.txt")
    status, output = script.wait(), (tmp_path / "log.txt").read_text()
    assert status == 0, output
    told = estimate(LORA._replace(rows=32, tokens=256, device=torch.device("cpu"), mapped=mapped))
    taken = int(output.splitlines()[-1])
    assert 0.8 * told.needed < taken < 1.3 * told.total
    if mapped:
        assert taken < 1.2 * told.needed


def test_more_takes_more() -> None:
    base = estimate(LORA)
    for change in (
        {"rows": 8},
        {"tokens": 128},
        {"rank": 8},
        {"dropout": 0.1},
        {"num_adapters": 2},
        {"packed": True},
        {"explicit_mask": True},
        {"device": torch.device("cpu")},
    ):
        assert estimate(LORA._replace(**change)).total > base.total, change
    for change in (
        {"checkpointing": True},
        {"chunk": 16},
        {"precision": "bfloat16"},
        {"precision": "int8"},
        {"precision": "nf4"},
    ):
        assert estimate(LORA._replace(**change)).total < base.total, change
    sizes = [
        memory._persistent(LORA._replace(precision=p)).weights for p in ("float32", "bfloat16", "int8", "nf4")
    ]
    assert sizes == sorted(sizes, reverse=True)
    on_cpu = LORA._replace(device=torch.device("cpu"))
    assert estimate(on_cpu).total > estimate(on_cpu._replace(mapped=True)).total == base.total


def test_holes_of_the_heap_are_told_for_a_cpu() -> None:
    for spec, share in ((FULL, memory.HEAP_FULL), (LORA, memory.HEAP_ADAPTER)):
        passing = sum(dry_run.measure_transient(spec))
        for checkpointing in (False, True):
            made = estimate(spec._replace(device=torch.device("cpu"), checkpointing=checkpointing))
            assert made.heap == made.total - made.needed == round(share * passing)


def test_activations_grow_with_the_tokens_and_not_their_square() -> None:
    short, long = (estimate(LORA._replace(tokens=tokens)).activations for tokens in (1024, 2048))
    assert long == pytest.approx(2 * short, rel=0.01)
    short, long = (estimate(LORA._replace(tokens=tokens, packed=True)).activations for tokens in (1024, 2048))
    assert long > 2.5 * short  # the mask of each layer


def test_nothing_is_drawn_and_nothing_changed() -> None:
    config, state = SMALL.to_dict(), torch.get_rng_state()
    estimate(LORA)
    assert torch.equal(torch.get_rng_state(), state)
    assert SMALL.to_dict() == config


# ------------------------------------------------------------------------------------------ refusal


def test_told() -> None:
    parts = Estimate(
        3_870_000_000, 160_000_000, 160_400_000, 320_000_000, 9_120_000_000, 0, 1_000_000, 0, LORA
    )
    assert (
        format_estimate(parts)
        == "13.6 GB: activations 9.1 GB, weights 3.9 GB, optimizer 320 MB, gradients 160 MB, adapters 160 "
        "MB, workspace 1 MB"
    )


def test_what_fits_is_not_refused() -> None:
    made = estimate(LORA)
    check_fits(made, made.total)


@pytest.mark.parametrize(
    ("spec", "wanted", "setting"),
    [
        (LORA, LORA._replace(rows=2), "machine.micro_batch=2"),
        (LORA, LORA._replace(rows=1), "machine.micro_batch=1"),
        (
            LORA._replace(rows=1),
            LORA._replace(rows=1, checkpointing=True),
            "machine.gradient_checkpointing=true",
        ),
        (
            DEEP,
            DEEP._replace(rows=2, checkpointing=True),
            "machine.gradient_checkpointing=true and machine.micro_batch=2",
        ),
        (
            FULL._replace(rows=1, tokens=8, checkpointing=True),
            FULL._replace(rows=1, tokens=8, checkpointing=True, rank=16),
            "tune=lora instead of full",
        ),
        (
            LORA._replace(rows=1, tokens=8, checkpointing=True),
            LORA._replace(rows=1, tokens=8, checkpointing=True, precision="nf4"),
            "frozen weights in nf4 (weights.*)",
        ),
        (
            LORA._replace(rows=1, checkpointing=True, precision="nf4"),
            LORA._replace(rows=1, checkpointing=True, precision="nf4", tokens=32),
            "text.max_prompt_tokens and text.max_answer_tokens halved",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_refusal_names_the_first_change_that_helps_and_its_figure(
    spec: StepSpec, wanted: StepSpec, setting: str
) -> None:
    made, smaller = estimate(spec), estimate(wanted)
    with pytest.raises(InputError) as refusal:
        check_fits(made, smaller.total)
    text = str(refusal.value)
    size = memory.format_bytes(smaller.total)
    assert (
        text
        == f"A training step would take about {format_estimate(made)}; {size} are free: with {setting} it "
        f"takes {size}."
    )


def test_a_refusal_when_nothing_helps() -> None:
    with pytest.raises(
        InputError,
        match=re.escape(
            "; 0 MB are free: nothing that can be set here makes it fit: take a smaller base or a device"
        ),
    ):
        check_fits(estimate(LORA), 1000)


def test_a_refusal_on_a_cpu_tells_the_heap() -> None:
    made = estimate(LORA._replace(device=torch.device("cpu")))
    assert made.heap > made.needed / 3  # far from a rounding error
    with pytest.raises(
        InputError,
        match=f", and up to {memory.format_bytes(made.total)} with the holes of the heap; 0 MB are free: ",
    ):
        check_fits(made, 1000)


# ---------------------------------------------------------------------------------------- available


def machine(folder: Path, files: dict[str, str]) -> Path:
    for name, text in ({"proc/meminfo": "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n"} | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 8_192_000),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 8_192_000),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "5000000\n",
                "sys/fs/cgroup/memory.current": "1000000\n",
            },
            4_000_000,
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "5000000",  # the limit of the group around it
                "sys/fs/cgroup/a/memory.current": "3000000",
                "sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 500000\n",
                "sys/fs/cgroup/a/b/memory.max": "max",
            },
            2_500_000,
        ),
        (
            {
                "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/docker/not-seen-from-inside\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 7",
            },
            2_000_007,
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": "5000",
                "sys/fs/cgroup/memory.current": "6000",
            },
            0,
        ),
    ],
)
def test_a_cpu_has_what_the_machine_and_the_container_leave(
    tmp_path: Path, files: dict[str, str], free: int
) -> None:
    assert available(torch.device("cpu"), system=machine(tmp_path, files)) == free


def test_this_machine_has_memory() -> None:
    assert available(torch.device("cpu")) > 1 << 20


def test_a_process_knows_what_it_held() -> None:
    before = peak()
    assert 0.9 * before < free_memory.peak(torch.device("cpu")) < 1.1 * peak() + (1 << 20)


def test_a_gpu_has_what_is_free_and_what_torch_holds_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert available(CUDA) == 1200


# ---------------------------------------------------------------------------- models of other kinds


@pytest.mark.parametrize(
    "kind", ["opt", "bloom", "falcon_alibi", "mpt", "gpt_neo", "mistral", "gemma2", "gemma3", "llama4"]
)
def test_every_kind_of_attention_is_rehearsed(kind: str) -> None:
    spec = StepSpec(attention_models.config(kind), rows=2, tokens=64, rank=2)
    for layout in ({"packed": True}, {"explicit_mask": True}):
        assert estimate(spec._replace(**layout)).activations > 0


def checked(tmp_path: Path) -> Run:
    """Check the memory of a step of SFT, with a base of which only config.json exists."""
    base = tmp_path / "base"
    attention_models.config("gpt_oss").save_pretrained(base)
    run = Run(tiny.write_job(tmp_path / "sft", "sft", {}, {"base": base}))
    training_setup.check_memory(
        Sft(), run, "base", None, tiny.CPU, training_setup.MicroBatch(2, 64, packed=True)
    )
    return run


def test_an_estimate_that_fails_is_a_warning(tmp_path: Path) -> None:
    (told,) = checked(tmp_path).warnings  # torch has no grouped product without data in float32
    assert told.startswith(
        "How much memory a step of sft takes is not known: the estimate fails on gpt_oss models "
        "(RuntimeError: "
    )


def test_a_refusal_inside_the_estimate_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: StepSpec) -> Estimate:
        raise InputError("Do this instead.")

    monkeypatch.setattr(memory, "estimate", refuse)
    with pytest.raises(InputError, match=r"Do this instead\."):
        checked(tmp_path)
