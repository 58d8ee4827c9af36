"""How much memory a training step will take at its peak, told before anything is loaded.

Weights, gradients and optimizer states are counted. What a step makes in passing is rehearsed: the model's own code runs forward and backward
on torch's meta device, where tensors have shapes and no memory, and the largest number of bytes alive at once is noted. So every architecture,
adapter and way of computing layers again is right without a formula for it. A 7B model takes about four seconds.
"""

import copy
import ctypes
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from tasks.rlhf import adapters, bases, chunked, models
from tasks.rlhf.refusal import InputError

META = torch.device("meta")
NF4_BLOCK, NF4_GROUP = 64, 256  # weights a scale, scales a scale of their own (Dettmers et al. 2023, arXiv 2305.14314, section 3)
SLACK = 1.05  # kernels' own buffers, and what the allocator cannot use again
# glibc's heap on a CPU keeps holes between tensors under 32 MB: measured, over what a step makes in passing without checkpointing. Adapters leave
# more of them, with their many small tensors between the large.
HEAP_ADAPTER, HEAP_FULL = 1.1, 0.5

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Plan(NamedTuple):
    """A training step: ``rows`` sequences of ``tokens`` at a time through a model of ``config``."""

    config: PretrainedConfig
    rows: int
    tokens: int
    precision: bases.Precision | bases.Stored | None = None  # None is as stored
    rank: int | None = None  # of a LoRA adapter on all linear layers; None trains every weight
    dropout: float = 0.0  # of the adapter
    num_adapters: int = 1  # that train
    checkpointing: bool = False  # each layer keeps its input only and is computed again
    packed: bool = False  # several documents in a row
    visible: bool = False  # a mask says what each token sees (branches); else attention is causal
    double_quantised: bool = True  # the scales of nf4
    chunk: int | None = None  # rows of logits at a time; None is chunked's own choice on `device`
    device: torch.device = torch.device("cpu")
    mapped: bool = False  # on a CPU, whether `map_large_tensors` was called: no holes, slower steps


class Estimate(NamedTuple):
    """Bytes at the peak of a training step."""

    weights: int  # of the base, frozen or not
    adapters: int
    gradients: int
    optimizer: int  # AdamW's two moments, which torch keeps in the parameter's type
    activations: int  # what the layers keep for the backward pass
    logits: int  # what the head's chunks add to that
    workspace: int  # what the backward pass through the layers adds to both, weights in passing, and slack
    heap: int  # on a CPU, holes between tensors
    plan: Plan

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[:-1])

    @property
    def needed(self) -> int:
        """All but the holes, which `map_large_tensors` avoids."""
        return self.total - self.heap


def estimate(plan: Plan) -> Estimate:
    """Peak memory of a training step, in bytes."""
    return _complete(_counted(plan))


def told(estimate: Estimate) -> str:
    """One line: 17.2 GB: weights 3.9 GB, activations 9.1 GB, ..."""
    parts = [(size, f"{name} {_gigabytes(size)}") for name, size in estimate._asdict().items() if name != "plan" and size]
    return f"{_gigabytes(estimate.total)}: " + ", ".join(text for _, text in sorted(parts, key=lambda part: -part[0]))


def check(estimate: Estimate, available: int) -> None:
    """Refuse a step that needs more than ``available`` bytes, with the first change that makes it fit. For its ``total``, see `map_large_tensors`."""
    if estimate.needed <= available:
        return
    advice = f"nothing that can be set here makes it fit: take a smaller base or a device with more memory than {_gigabytes(available)}"
    seen = estimate
    for setting, plan in _alternatives(estimate.plan):
        if plan == seen.plan._replace(rows=plan.rows) and _at_least(seen, plan.rows) > available:
            continue
        smaller = _counted(plan)
        if smaller.needed <= available and (seen := _complete(smaller)).needed <= available:
            advice = f"with {setting} it takes {_gigabytes(seen.needed)}"
            break
    raise InputError(f"A training step would take about {told(estimate._replace(heap=0))}; {_gigabytes(available)} are free: {advice}.")


def _at_least(larger: Estimate, rows: int) -> float:
    """A bound for fewer rows that needs no rehearsal: what a step makes in passing shrinks with them at most."""
    passing = larger.activations + larger.logits + larger.workspace
    return larger.needed - passing * (1 - rows / larger.plan.rows)


def map_large_tensors() -> None:
    """From now on tensors of 1 MiB and more get pages of their own on a CPU, so ``total`` comes down to ``needed``.

    For a step of which the one fits in memory and the other does not: steps take up to half as long again.
    Only glibc has the switch, and the heap with the holes.
    """
    process = ctypes.CDLL(None)
    if hasattr(process, "mallopt"):
        process.mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _alternatives(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """What to set and what it gives: what leaves the result as it is comes first, then what costs a little quality, then all together."""
    settings: list[str] = []
    for rows in _halves(plan.rows):
        yield f"machine.micro_batch={rows}", plan._replace(rows=rows)
    if not plan.checkpointing:
        settings, checkpointed = ["machine.gradient_checkpointing=true"], plan._replace(checkpointing=True)
        yield settings[0], checkpointed
        for rows in _halves(plan.rows):
            yield f"machine.gradient_checkpointing=true and machine.micro_batch={rows}", checkpointed._replace(rows=rows)
    if plan.rows > 1:
        settings.append("machine.micro_batch=1")
    least = plan._replace(checkpointing=True, rows=1)
    if plan.rank is None:
        yield "tune=lora instead of full", plan._replace(rank=16)
        settings.append("tune=lora instead of full")
        least = least._replace(rank=16)
    if plan.precision not in ("int8", "nf4"):
        if plan.rank is not None:
            yield "frozen weights in nf4 (weights.*)", plan._replace(precision="nf4")
        settings.append("frozen weights in nf4 (weights.*)")
        least = least._replace(precision="nf4")
    yield "text.max_prompt_tokens and text.max_answer_tokens halved", plan._replace(tokens=-(-plan.tokens // 2))
    if settings:
        yield " and ".join(settings), least
    yield " and ".join(["text.max_prompt_tokens and text.max_answer_tokens halved", *settings]), least._replace(tokens=-(-plan.tokens // 2))


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count //= 2
        yield count


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------------------------------ counted


def _counted(plan: Plan) -> Estimate:
    """What lies there between two steps."""
    assert plan.rank is not None or plan.precision not in ("int8", "nf4"), "a quantised base cannot train"
    model = _model(plan)
    added, weights = 0, _weight_bytes(model, plan)
    trained = _num_bytes(model.parameters())
    if plan.rank is not None:
        trained = added = plan.num_adapters * _num_bytes(adapters.parameters(_adapted(model, plan), "rehearsed").values())
    return Estimate(weights, added, gradients=trained, optimizer=2 * trained, activations=0, logits=0, workspace=0, heap=0, plan=plan)


def _model(plan: Plan) -> PreTrainedModel:
    """The model with its sizes and types and without any memory, frozen."""
    models.quiet_libraries()
    config = copy.deepcopy(plan.config)
    quantised = plan.precision in ("int8", "nf4", None)
    dtype = (config.dtype or torch.float32) if quantised else getattr(torch, str(plan.precision))
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    model.eval()
    return model


def _adapted(model: PreTrainedModel, plan: Plan) -> PeftModel:
    assert plan.rank is not None
    settings = adapters.lora_config(rank=plan.rank, alpha=plan.rank, dropout=plan.dropout, targets="all-linear")
    with model.device:
        return adapters.attach(model, "rehearsed", settings)


def _weight_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """The base's parameters. Quantised are the matrices of the layers; embeddings, head and norms stay as stored."""
    quantised = {id(matrix.weight): matrix.weight for matrix in _matrices(model)} if plan.precision in ("int8", "nf4") else {}
    size = _num_bytes(p for p in model.parameters() if id(p) not in quantised)
    for weight in quantised.values():
        if plan.precision == "int8":
            size += weight.numel() + 4 * weight.shape[0]  # a float32 scale a row
        else:
            scales = -(-weight.numel() // NF4_BLOCK)
            size += weight.numel() // 2 + (scales + 4 * -(-scales // NF4_GROUP) if plan.double_quantised else 4 * scales)
    return size


def _matrices(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    head = models.output_head(model)
    return [module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ---------------------------------------------------------------------------------------------------------------------- rehearsed


class _Passing(NamedTuple):
    """Bytes that a step makes in passing, each beyond those before."""

    activations: int
    logits: int
    workspace: int


def _complete(counted: Estimate) -> Estimate:
    """The estimate with what a step makes in passing."""
    plan = counted.plan
    passing, heap = _rehearsed(plan), 0
    if plan.device.type == "cpu" and not plan.mapped:
        kept_all = _rehearsed(plan._replace(checkpointing=False)) if plan.checkpointing else passing
        heap = round(sum(kept_all) * (HEAP_FULL if plan.rank is None else HEAP_ADAPTER))
    return counted._replace(heap=heap, **passing._asdict())


def _rehearsed(plan: Plan) -> _Passing:
    """One micro-batch forward and backward on tensors without memory."""
    model = _model(plan)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register("rehearsed", _attention)
        AttentionMaskInterface.register("rehearsed", sdpa_mask)
        model.set_attn_implementation("rehearsed")
    if plan.checkpointing:
        bases.gradient_checkpointing(model)
    largest = max(matrix.weight.numel() for matrix in _matrices(model))
    whole = {"int8": 8, "nf4": model.dtype.itemsize}.get(str(plan.precision), 0) * largest  # one quantised matrix at a time is made whole again
    with _ready(model, plan) as base, _Alive(answer=not plan.packed) as alive:
        hidden = _hidden(base, plan)
        kept = alive.now
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=META)
        rows = chunked.chunk_rows(len(hidden), base.config.vocab_size, device=plan.device, chunk=plan.chunk)
        loss = chunked.cross_entropy(hidden, models.output_head(base), targets, count=1, chunk=rows)
        logits = alive.most - kept
        del hidden
        torch.autograd.backward(loss)
    workspace = alive.most - kept - logits + whole
    return _Passing(kept, logits, workspace + round((SLACK - 1) * (kept + logits + workspace)))


@contextmanager
def _ready(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    """The model as it trains; gradients are there already, as in every micro-batch but the first."""
    if plan.rank is None:
        trained = list(model.requires_grad_(True).parameters())
    else:
        peft = _adapted(model, plan)
        adapters.train_mode(peft)
        trained = list(adapters.parameters(peft, "rehearsed").values())
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    if plan.rank is None:
        yield model
    else:
        with adapters.active(peft, "rehearsed") as base:
            yield base


def _hidden(base: PreTrainedModel, plan: Plan) -> Tensor:
    """Last hidden states (rows * tokens, D)."""
    ids = torch.zeros((plan.rows, plan.tokens), dtype=torch.int64, device=META)
    visible = torch.ones((plan.rows, plan.tokens, plan.tokens), dtype=torch.bool, device=META) if plan.visible else None
    return models.hidden_states(base, ids, visible=visible).flatten(0, 1)


class _Alive(TorchDispatchMode):
    """Bytes of the tensors made inside: those alive now, and the most that ever were.

    Models ask their data one thing that matters, which has no answer without data: whether the positions begin once in every row. It is ``answer``.
    """

    def __init__(self, *, answer: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer
        self.now = self.most = 0
        self.known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in made if isinstance(made, tuple | list) else (made,):
            if isinstance(x, Tensor):
                self._see(x, given)
        return made

    def _see(self, made: Tensor, given: set[int]) -> None:
        storage = made.untyped_storage()
        key = storage._cdata
        if key in self.known or key in given:  # a view of an argument, or the argument itself
            return
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        self.known[key] = weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size


def _attention(
    _: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_settings: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention as torch's kernels for CPU and CUDA keep it, O(T); on the meta device it would be the O(T^2) of its definition."""
    if attention_mask is not None:  # transformers then repeats keys and values for every head
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output: Tensor = _Attention.apply(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """The shapes of attention: query (B, H, T, d), key and value (B, K, T, d). A mask of booleans is turned into numbers in every layer."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        normalisers = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalisers, mask.to(query.dtype) if mask is not None else None)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


# ---------------------------------------------------------------------------------------------------------------------- available


def available(device: torch.device, *, system: Path = Path("/")) -> int:
    """Bytes that a program can still take on ``device``; ``system`` is where the files of the machine's kernel are."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds some for itself
    described = dict(line.split(":", 1) for line in (system / "proc/meminfo").read_text().splitlines())
    free = 1024 * int(described["MemAvailable"].split()[0])
    return min([free, *_rooms(system)])


def _rooms(system: Path) -> Iterator[int]:
    """What the limits of the process's control groups leave: its own and those around it, of version 2 and 1."""
    listed = system / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = system / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        folder = top / group.strip("/")  # inside a container the path may be the host's: then only the top exists
        for place in (folder, *folder.parents):
            if place.is_relative_to(top) and (text := _text(place / limit)).isdigit():
                yield max(0, int(text) - int(_text(place / usage) or 0) + _reclaimable(place / "memory.stat"))


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _reclaimable(path: Path) -> int:
    """Bytes of files that were read and are not in use: counted as used, and given up when asked for."""
    fields = dict(line.split() for line in _text(path).splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
