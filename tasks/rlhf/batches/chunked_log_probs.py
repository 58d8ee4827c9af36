"""Compute log_probs of given tokens without holding all logits: the output head is applied to chunks of rows.

Logits are by far the largest tensor of a step: with V = 128 k a token takes 512 KB in fp32, and the usual way
holds three such tensors. Here the gradient of a token's log-probability with respect to its hidden state,
W[target] - softmax W, is computed while the token's logits exist and is kept instead of them: (N, D) in place
of (N, V), exact, without computing anything twice (as in the Liger kernel, Hsu et al. 2024, arXiv
2410.10989).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Bytes of float32 logits per chunk. Each chunk reads the whole head: below some 300 rows a GPU waits for
# memory.
BUDGET, CUDA_BUDGET = 64 << 20, 256 << 20
MIN_ROWS = 64  # smaller matrix products run at half the speed


def chunk_rows(num_rows: int, vocabulary: int, *, device: torch.device, chunk: int | None = None) -> int:
    """Return the rows of a chunk: at most ``chunk`` (default: by the byte budget), equal for all chunks."""
    budget = CUDA_BUDGET if device.type == "cuda" else BUDGET
    most = max(MIN_ROWS, budget // (4 * vocabulary)) if chunk is None else chunk
    return -(-num_rows // -(-num_rows // most)) if num_rows else 1


def cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, count: float | Tensor, chunk: int | None = None
) -> Tensor:
    """Return the sum of the next-token losses over ``count``, a scalar.

    hidden (N, D), targets (N,) in [0, V). ``count`` is the number of targets of the whole optimizer step,
    ``chunk`` the greatest number of rows of logits that exist at a time.
    """
    if not (type(head) is nn.Linear and _is_trained(head)):
        return -log_probs(hidden, head, targets, chunk=chunk).sum() / count
    rows = chunk_rows(len(targets), head.out_features, device=hidden.device, chunk=chunk)
    total: Tensor = _TrainedHeadSum.apply(hidden, head.weight, head.bias, targets, rows)  # type: ignore[no-untyped-call]
    return -total / count


def log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Return the log-probability of each target given the hidden state before it, (N,) float32.

    hidden (N, D), targets (N,) in [0, V). If the head is trained, or is more than a matrix (one with an
    adapter), each chunk's logits are computed a second time in the backward pass.
    """
    rows = chunk_rows(len(targets), _vocabulary(head), device=hidden.device, chunk=chunk)
    chunks = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    is_trained = _is_trained(head)
    is_linear = type(head) is nn.Linear
    needs_gradient = is_trained or (torch.is_grad_enabled() and hidden.requires_grad)
    if not needs_gradient or (len(chunks) == 1 and (is_trained or not is_linear)):
        # A single chunk's logits may wait for the backward pass.
        return torch.cat([_chunk_log_probs(h, head, t, temperature) for h, t in chunks])
    if not is_linear:
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=_uses_dropout(head))
        return torch.cat([recompute(_chunk_log_probs, h, head, t, temperature) for h, t in chunks])
    function = _TrainedHeadLogProbs if is_trained else _FrozenHeadLogProbs
    result: Tensor = function.apply(hidden, head.weight, head.bias, targets, temperature, rows)  # type: ignore[no-untyped-call]
    return result


def _is_trained(head: nn.Module) -> bool:
    """Return whether the head itself needs a gradient."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())


def _uses_dropout(head: nn.Module) -> bool:
    """Return whether the head draws random numbers, which must be the same when it is computed again."""
    return any(isinstance(module, nn.Dropout) and module.training for module in head.modules())


def _vocabulary(head: nn.Module) -> int:
    size = head.out_features  # an adapter's wrapper has it too
    assert isinstance(size, int)
    return size


def _chunk_log_probs(hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float) -> Tensor:
    return -F.cross_entropy(_scaled(head(hidden), temperature), targets, reduction="none")


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return the logits in float32 (or float64), divided by the temperature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


class _Gradients(NamedTuple):
    """Log-probabilities, and the gradients of their sum; None if not requested."""

    log_probs: Tensor  # (N,) float32
    by_hidden: Tensor | None  # (N, D)
    by_weight: Tensor | None  # (V, D) float32 whatever the head is: it is summed over the chunks
    by_bias: Tensor | None  # (V,) float32


def _forward_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    needs_gradient: tuple[bool, ...],
    rows: int,
    scale: Tensor | None,
    temperature: float,
) -> _Gradients:
    """Return log-probabilities and the requested gradients of their sum, times the temperature.

    ``needs_gradient`` is for (hidden, weight, bias), ``scale`` (N,) weights the sum.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    result = _Gradients(
        hidden.new_empty(len(hidden), dtype=exact),
        torch.empty_like(hidden) if needs_gradient[0] else None,
        torch.zeros_like(weight, dtype=exact) if needs_gradient[1] else None,
        weight.new_zeros(len(weight), dtype=exact) if needs_gradient[2] else None,
    )
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        _write_chunk(
            result,
            part,
            # not assigned to a name: the logits must be freed before the next chunk's are computed
            torch.log_softmax(_scaled(F.linear(hidden[part], weight, bias), temperature), dim=1),
            hidden,
            weight,
            targets[part],
            scale,
        )
    return result


def _write_chunk(
    result: _Gradients,
    part: slice,
    log_softmax: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
) -> None:
    """Write one chunk's log_probs and gradients into ``result``; ``log_softmax`` (n, V) is overwritten."""
    at_targets = torch.arange(len(targets), device=targets.device), targets
    result.log_probs[part] = log_softmax[at_targets]
    if result.by_hidden is result.by_weight is result.by_bias is None:
        return
    residual = log_softmax.exp_().neg_()  # becomes onehot - softmax, in place
    residual[at_targets] += 1
    if scale is not None:
        residual *= scale[part, None]
    residual = residual.to(weight.dtype)
    if result.by_hidden is not None:
        torch.mm(residual, weight, out=result.by_hidden[part])
    if result.by_weight is not None:
        _add_product(result.by_weight, residual.T, hidden[part])
    if result.by_bias is not None:
        result.by_bias.add_(residual.sum(dim=0, dtype=result.by_bias.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to ``total``, without a temporary of its size if the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _FrozenHeadLogProbs(torch.autograd.Function):
    """Log-probabilities (N,) of a frozen head; gradients by the hidden states, (N, D), are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
    ) -> Tensor:
        result = _forward_chunks(
            hidden,
            weight,
            bias,
            targets,
            needs_gradient=(True, False, False),
            rows=rows,
            scale=None,
            temperature=temperature,
        )
        ctx.save_for_backward(result.by_hidden)
        ctx.temperature = temperature
        return result.log_probs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (by_hidden,) = ctx.saved_tensors
        gradient = (by_hidden * (upstream[0] / ctx.temperature)[:, None]).to(by_hidden.dtype)
        return gradient, None, None, None, None, None


class _TrainedHeadLogProbs(torch.autograd.Function):
    """Log-probabilities (N,) of a trained head, computed again in the backward pass.

    The head's gradient is a sum over tokens, whose upstream gradients are known only then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature, ctx.rows = temperature, rows
        return _forward_chunks(
            hidden,
            weight,
            bias,
            targets,
            needs_gradient=(False, False, False),
            rows=rows,
            scale=None,
            temperature=temperature,
        ).log_probs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0] / ctx.temperature
        result = _forward_chunks(
            *ctx.saved_tensors,
            needs_gradient=ctx.needs_input_grad[:3],
            rows=ctx.rows,
            scale=scale,
            temperature=ctx.temperature,
        )
        dtype = ctx.saved_tensors[1].dtype
        return *(None if x is None else x.to(dtype) for x in result[1:]), None, None, None


class _TrainedHeadSum(torch.autograd.Function):
    """Sum of the log-probabilities of a trained head; the forward pass computes all gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
    ) -> Tensor:
        result = _forward_chunks(
            hidden,
            weight,
            bias,
            targets,
            needs_gradient=ctx.needs_input_grad[:3],
            rows=rows,
            scale=None,
            temperature=1.0,
        )
        ctx.save_for_backward(*result[1:])
        ctx.dtype = weight.dtype
        return result.log_probs.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(None if x is None else (x * upstream[0]).to(ctx.dtype) for x in ctx.saved_tensors),
            None,
            None,
        )
