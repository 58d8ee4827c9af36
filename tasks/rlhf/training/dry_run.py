"""Measure the transient memory of a training step on tensors that have shapes but no data.

Forward and backward run on torch's meta device while the largest number of bytes alive at once is recorded.
So the result holds for every architecture, adapter and kind of gradient checkpointing, without a formula for
it. A 7B model takes about four seconds.
"""

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
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
from tasks.rlhf.batches.attention_masks import Segments
from tasks.rlhf.compute import cpu_attention
from tasks.rlhf.models import gradient_checkpointing, lora, quantised
from tasks.rlhf.models.folder_tokenizer import quiet_libraries

META = torch.device("meta")
# Weights per scale, and scales per second-level scale (Dettmers et al. 2023, arXiv 2305.14314, section 3).
NF4_BLOCK, NF4_GROUP = 64, 256
SLACK = 1.05  # kernels' own buffers, and what the allocator cannot use again
NAME = "dry_run"  # of the adapter and of the attention implementation


class StepSpec(NamedTuple):
    """A training step: ``rows`` sequences of ``tokens`` at a time through a model of ``config``."""

    config: PretrainedConfig
    rows: int
    tokens: int
    precision: quantised.Precision | quantised.Stored | None = None  # None is as stored
    rank: int | None = None  # of a LoRA adapter; None trains every weight
    targets: str | tuple[str, ...] = "all-linear"  # of the adapter
    dropout: float = 0.0  # of the adapter
    num_adapters: int = 1  # that train
    checkpointing: bool = False  # each layer keeps its input only and is recomputed in the backward pass
    packed: bool = False  # several documents in a row
    explicit_mask: bool = False  # a mask says what each token sees (shared prompts), else attention is causal
    double_quantised: bool = True  # the scales of nf4
    chunk: int | None = None  # rows of logits at a time; None is the choice of chunked_log_probs on `device`
    device: torch.device = torch.device("cpu")
    mapped: bool = False  # on a CPU, whether `map_large_tensors` was called: no fragmentation, slower steps


# ------------------------------------------------------------------------------- persistent memory


def empty_model(spec: StepSpec) -> PreTrainedModel:
    """Return the frozen model with its shapes and types on the meta device."""
    quiet_libraries()
    config = copy.deepcopy(spec.config)
    as_stored = spec.precision in ("int8", "nf4", None)
    dtype = (config.dtype or torch.float32) if as_stored else getattr(torch, str(spec.precision))
    with META:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    model.requires_grad_(False)
    model.eval()
    return model


def attach_adapter(model: PreTrainedModel, spec: StepSpec) -> PeftModel:
    """Return ``model`` with the adapter of ``spec``."""
    assert spec.rank is not None
    settings = lora.build_config(rank=spec.rank, alpha=spec.rank, dropout=spec.dropout, targets=spec.targets)
    with model.device:
        return lora.attach(model, NAME, settings)


def weight_bytes(model: PreTrainedModel, spec: StepSpec) -> int:
    """Return the size of the base's parameters.

    Quantisation is of the layers' matrices; embeddings, head and norms stay as stored.
    """
    if spec.precision not in ("int8", "nf4"):
        return num_bytes(model.parameters())
    matrices = {id(matrix.weight): matrix.weight for matrix in _matrices(model)}
    size = num_bytes(parameter for parameter in model.parameters() if id(parameter) not in matrices)
    for weight in matrices.values():
        if spec.precision == "int8":
            size += weight.numel() + 4 * weight.shape[0]  # a float32 scale a row
        else:
            scales = -(-weight.numel() // NF4_BLOCK)
            scale_bytes = scales + 4 * -(-scales // NF4_GROUP) if spec.double_quantised else 4 * scales
            size += weight.numel() // 2 + scale_bytes
    return size


def _matrices(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    head = forward.output_head(model)
    return [
        module for module in model.modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the size of all ``tensors``."""
    return sum(x.numel() * x.element_size() for x in tensors)


# ------------------------------------------------------------------------------- transient memory


class TransientMemory(NamedTuple):
    """Bytes that exist only during a step, each beyond those before."""

    activations: int
    logits: int
    workspace: int


def measure_transient(spec: StepSpec) -> TransientMemory:
    """Run one micro-batch forward and backward on the meta device. Return the bytes that it needs."""
    model = empty_model(spec)
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, partial(_attention, device=spec.device))
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)
    if spec.checkpointing:
        gradient_checkpointing.enable(model)
    # One quantised matrix at a time is dequantised for its product.
    largest = max(matrix.weight.numel() for matrix in _matrices(model))
    dequantised = {"int8": 8, "nf4": model.dtype.itemsize}.get(str(spec.precision), 0) * largest
    with training_model(model, spec) as base, _AliveBytes(answer=not spec.packed) as alive:
        hidden = _hidden_states(base, spec)
        activations = alive.now
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=META)
        rows = chunked_log_probs.chunk_rows(
            len(hidden), base.config.vocab_size, device=spec.device, chunk=spec.chunk
        )
        head = forward.output_head(base)
        loss = chunked_log_probs.cross_entropy(hidden, head, targets, count=1, chunk=rows)
        logits = alive.most - activations
        del hidden
        torch.autograd.backward(loss)
    workspace = alive.most - activations - logits + dequantised
    slack = round((SLACK - 1) * (activations + logits + workspace))
    return TransientMemory(activations, logits, workspace + slack)


@contextmanager
def training_model(model: PreTrainedModel, spec: StepSpec) -> Iterator[PreTrainedModel]:
    """Yield the model in training, with gradients allocated, as in every micro-batch but the first."""
    if spec.rank is None:
        _allocate_gradients(model.requires_grad_(True).parameters())
        yield model
        return
    adapted = attach_adapter(model, spec)
    lora.train_mode(adapted)
    _allocate_gradients(lora.parameters(adapted, NAME).values())
    with lora.active(adapted, NAME) as base:
        yield base


def _allocate_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)


def _hidden_states(base: PreTrainedModel, spec: StepSpec) -> Tensor:
    """Return last hidden states, (rows * tokens, D)."""
    ids = torch.zeros((spec.rows, spec.tokens), dtype=torch.int64, device=META)
    if not spec.explicit_mask or attention_masks.reason_for_one_text_per_row(base):
        return forward.hidden_states(base, ids).flatten(0, 1)
    segments = Segments(torch.zeros_like(ids), torch.zeros_like(ids))
    return forward.hidden_states(base, ids, torch.zeros_like(ids), segments).flatten(0, 1)


class _AliveBytes(TorchDispatchMode):
    """Count the bytes of the tensors created inside: those alive now, and the most at any time.

    Models branch on one property of their data, which is unknown without data: whether the positions begin
    once in every row. They are told ``answer``.
    """

    def __init__(self, *, answer: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.answer = answer
        self.now = self.most = 0
        self.known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        outputs = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(x, Tensor):
                self._count(x, inputs)
        return outputs

    def _count(self, output: Tensor, inputs: set[int]) -> None:
        storage = output.untyped_storage()
        key = storage._cdata
        if key in self.known or key in inputs:  # a view of an argument, or the argument itself
            return
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        self.known[key] = weakref.finalize(storage, self._subtract, key, storage.nbytes())

    def _subtract(self, key: int, size: int) -> None:
        del self.known[key]
        self.now -= size


def _attention(
    _: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    device: torch.device,
    **_settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute attention with the O(T) memory of torch's CPU and CUDA kernels; on the meta device torch would
    use the O(T^2) definition. ``device`` is the one whose memory is measured.
    """
    dtype = query.dtype
    if device.type == "cpu" and cpu_attention.is_slow_in_half(query):
        query, key, value = query.float(), key.float(), value.float()
    if attention_mask is not None:  # transformers then repeats keys and values for every head
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output: Tensor = _Attention.apply(query, key, value, attention_mask)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous().to(dtype), None


class _Attention(torch.autograd.Function):
    """The shapes of attention: query (B, H, T, d), key and value (B, K, T, d).

    A boolean mask is converted to numbers in every layer.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        normalisers = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        numbers = mask.to(query.dtype) if mask is not None else None
        ctx.save_for_backward(query, key, value, output, normalisers, numbers)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None
