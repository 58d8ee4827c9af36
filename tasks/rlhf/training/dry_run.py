"""A training step without memory: what it makes in passing, found by running the model's own code on tensors that have shapes alone.

The model runs forward and backward on torch's meta device, and the largest number of bytes alive at once is noted. So every architecture, adapter
and way of computing layers again is right without a formula for it. A 7B model takes about four seconds.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from tasks.rlhf.batches import attention_masks, chunked_log_probs, forward
from tasks.rlhf.models import gradient_checkpointing, loading, lora, quantised

META = torch.device("meta")
NF4_BLOCK, NF4_GROUP = (
    64,
    256,
)  # weights a scale, scales a scale of their own (Dettmers et al. 2023, arXiv 2305.14314, section 3)
SLACK = 1.05  # kernels' own buffers, and what the allocator cannot use again


class Plan(NamedTuple):
    """A training step: ``rows`` sequences of ``tokens`` at a time through a model of ``config``."""

    config: PretrainedConfig
    rows: int
    tokens: int
    precision: quantised.Precision | quantised.Stored | None = None  # None is as stored
    rank: int | None = None  # of a LoRA adapter; None trains every weight
    targets: str | tuple[str, ...] = "all-linear"  # of the adapter
    dropout: float = 0.0  # of the adapter
    num_adapters: int = 1  # that train
    checkpointing: bool = False  # each layer keeps its input only and is computed again
    packed: bool = False  # several documents in a row
    visible: bool = False  # a mask says what each token sees (branches); else attention is causal
    double_quantised: bool = True  # the scales of nf4
    chunk: int | None = None  # rows of logits at a time; None is chunked's own choice on `device`
    device: torch.device = torch.device("cpu")
    mapped: bool = False  # on a CPU, whether `map_large_tensors` was called: no holes, slower steps


# ----------------------------------------------------------------------------------------------------- what lies there all the time


def bare(plan: Plan) -> PreTrainedModel:
    """The model with its sizes and types and without any memory, frozen."""
    loading.quiet_libraries()
    config = copy.deepcopy(plan.config)
    quantised = plan.precision in ("int8", "nf4", None)
    dtype = (config.dtype or torch.float32) if quantised else getattr(torch, str(plan.precision))
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    model.eval()
    return model


def adapted(model: PreTrainedModel, plan: Plan) -> PeftModel:
    assert plan.rank is not None
    settings = lora.build_config(rank=plan.rank, alpha=plan.rank, dropout=plan.dropout, targets=plan.targets)
    with model.device:
        return lora.attach(model, "rehearsed", settings)


def weight_bytes(model: PreTrainedModel, plan: Plan) -> int:
    """The base's parameters. Quantised are the matrices of the layers; embeddings, head and norms stay as stored."""
    quantised = (
        {id(matrix.weight): matrix.weight for matrix in _matrices(model)}
        if plan.precision in ("int8", "nf4")
        else {}
    )
    size = num_bytes(p for p in model.parameters() if id(p) not in quantised)
    for weight in quantised.values():
        if plan.precision == "int8":
            size += weight.numel() + 4 * weight.shape[0]  # a float32 scale a row
        else:
            scales = -(-weight.numel() // NF4_BLOCK)
            size += weight.numel() // 2 + (
                scales + 4 * -(-scales // NF4_GROUP) if plan.double_quantised else 4 * scales
            )
    return size


def _matrices(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    head = forward.output_head(model)
    return [
        module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# ------------------------------------------------------------------------------------------------------- what is made in passing


class Passing(NamedTuple):
    """Bytes that a step makes in passing, each beyond those before."""

    activations: int
    logits: int
    workspace: int


def passing(plan: Plan) -> Passing:
    """One micro-batch forward and backward on tensors without memory."""
    model = bare(plan)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register("rehearsed", _attention)
        AttentionMaskInterface.register("rehearsed", sdpa_mask)
        model.set_attn_implementation("rehearsed")
    if plan.checkpointing:
        gradient_checkpointing.enable(model)
    largest = max(matrix.weight.numel() for matrix in _matrices(model))
    whole = {"int8": 8, "nf4": model.dtype.itemsize}.get(
        str(plan.precision), 0
    ) * largest  # one quantised matrix at a time is made whole again
    with ready(model, plan) as base, _Alive(answer=not plan.packed) as alive:
        hidden = _hidden(base, plan)
        kept = alive.now
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=META)
        rows = chunked_log_probs.chunk_rows(
            len(hidden), base.config.vocab_size, device=plan.device, chunk=plan.chunk
        )
        loss = chunked_log_probs.cross_entropy(
            hidden, forward.output_head(base), targets, count=1, chunk=rows
        )
        logits = alive.most - kept
        del hidden
        torch.autograd.backward(loss)
    workspace = alive.most - kept - logits + whole
    return Passing(kept, logits, workspace + round((SLACK - 1) * (kept + logits + workspace)))


@contextmanager
def ready(model: PreTrainedModel, plan: Plan) -> Iterator[PreTrainedModel]:
    """The model as it trains; gradients are there already, as in every micro-batch but the first."""
    if plan.rank is None:
        trained = list(model.requires_grad_(True).parameters())
    else:
        peft = adapted(model, plan)
        lora.train_mode(peft)
        trained = list(lora.parameters(peft, "rehearsed").values())
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    if plan.rank is None:
        yield model
    else:
        with lora.active(peft, "rehearsed") as base:
            yield base


def _hidden(base: PreTrainedModel, plan: Plan) -> Tensor:
    """Last hidden states (rows * tokens, D)."""
    ids = torch.zeros((plan.rows, plan.tokens), dtype=torch.int64, device=META)
    if not plan.visible or attention_masks.reason_for_one_text_per_row(base):
        return forward.hidden_states(base, ids).flatten(0, 1)
    visible = torch.ones((plan.rows, plan.tokens, plan.tokens), dtype=torch.bool, device=META)
    return forward.hidden_states(base, ids, torch.zeros_like(ids), visible).flatten(0, 1)


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
        ctx.save_for_backward(
            query, key, value, output, normalisers, mask.to(query.dtype) if mask is not None else None
        )
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None
