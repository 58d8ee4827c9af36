"""Log-probabilities of given tokens without ever holding the logits of all of them: the output head is applied to some rows at a time.

Logits are by far the largest tensor of a step: V = 128 k makes 512 KB of them a token in fp32, and the plain way holds three such tensors. Here the
gradient of a token's log-probability by its hidden state, W[target] - softmax W, is made while the token's logits are there and kept instead of
them: (N, D) in place of (N, V), exact, and nothing is computed twice (the way of the Liger kernel, Hsu et al. 2024, arXiv:2410.10989).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Bytes of float32 logits at a time. Each chunk reads the whole head: a GPU needs some 300 rows a chunk to be bound by arithmetic rather than by that.
BUDGET, CUDA_BUDGET = 64 << 20, 256 << 20
MIN_ROWS = 64  # fewer make small matrix products, which run at half the speed


def chunk_rows(num_rows: int, vocabulary: int, *, device: torch.device, chunk: int | None = None) -> int:
    """Rows of logits at a time: at most ``chunk`` (default: what the byte budget allows), in chunks of like size."""
    budget = CUDA_BUDGET if device.type == "cuda" else BUDGET
    most = max(MIN_ROWS, budget // (4 * vocabulary)) if chunk is None else chunk
    return -(-num_rows // -(-num_rows // most)) if num_rows else 1


def cross_entropy(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, count: float | Tensor, chunk: int | None = None
) -> Tensor:
    """Sum of the next-token losses over ``count``, a scalar.

    hidden (N, D), targets (N,) in [0, V); count is the targets of the whole optimizer step, chunk the most rows of logits alive at any time.
    """
    if not (type(head) is nn.Linear and _is_trained(head)):
        return -log_probs(hidden, head, targets, chunk=chunk).sum() / count
    rows = chunk_rows(len(targets), head.out_features, device=hidden.device, chunk=chunk)
    total: Tensor = _TrainedHeadSum.apply(hidden, head.weight, head.bias, targets, rows)  # type: ignore[no-untyped-call]
    return -total / count


def log_probs(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Log-probability of each of ``targets`` by the hidden state before it, (N,) float32; hidden (N, D), targets (N,) in [0, V).

    A head that trains, or is more than a matrix (one with an adapter), computes each chunk's logits a second time in the backward pass.
    """
    rows = chunk_rows(len(targets), _vocabulary(head), device=hidden.device, chunk=chunk)
    pieces = list(zip(hidden.split(rows), targets.split(rows), strict=True))
    trains = _is_trained(head)
    if not (trains or (torch.is_grad_enabled() and hidden.requires_grad)) or (
        len(pieces) == 1 and (trains or type(head) is not nn.Linear)
    ):
        return torch.cat(
            [_chunk_log_probs(h, head, t, temperature) for h, t in pieces]
        )  # one chunk is as good as all: its logits may wait
    if type(head) is not nn.Linear:
        return torch.cat(
            [
                checkpoint(
                    _chunk_log_probs,
                    h,
                    head,
                    t,
                    temperature,
                    use_reentrant=False,
                    preserve_rng_state=_uses_dropout(head),
                )
                for h, t in pieces
            ]
        )
    kind = _TrainedHeadLogProbs if trains else _FrozenHeadLogProbs
    result: Tensor = kind.apply(hidden, head.weight, head.bias, targets, temperature, rows)  # type: ignore[no-untyped-call]
    return result


def _is_trained(head: nn.Module) -> bool:
    """Whether a gradient is wanted of the head itself."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in head.parameters())


def _uses_dropout(head: nn.Module) -> bool:
    """Whether the head draws random numbers, which its second pass must draw again."""
    return any(isinstance(module, nn.Dropout) and module.training for module in head.modules())


def _vocabulary(head: nn.Module) -> int:
    size = head.out_features  # of an adapter's wrapper too
    assert isinstance(size, int)
    return size


def _chunk_log_probs(hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float) -> Tensor:
    return -F.cross_entropy(_scaled(head(hidden), temperature), targets, reduction="none")


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32 (float64 stays), divided by the temperature."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if temperature == 1 else logits / temperature


class _Gradients(NamedTuple):
    """What one pass over the chunks gives; None where it is not wanted."""

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
    wanted: tuple[bool, ...],
    rows: int,
    scale: Tensor | None,
    temperature: float,
) -> _Gradients:
    """Log-probabilities, and the wanted gradients of their sum weighted by ``scale`` (N,), by (hidden, weight, bias) times the temperature."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    made = _Gradients(
        hidden.new_empty(len(hidden), dtype=exact),
        torch.empty_like(hidden) if wanted[0] else None,
        torch.zeros_like(weight, dtype=exact) if wanted[1] else None,
        weight.new_zeros(len(weight), dtype=exact) if wanted[2] else None,
    )
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        # the logits have no name here: they must be gone when the next chunk's are made
        _write_chunk(
            made,
            part,
            torch.log_softmax(_scaled(F.linear(hidden[part], weight, bias), temperature), dim=1),
            hidden,
            weight,
            targets[part],
            scale,
        )
    return made


def _write_chunk(
    made: _Gradients,
    part: slice,
    log_softmax: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor | None,
) -> None:
    """A chunk's share of everything wanted; ``log_softmax`` (n, V) is overwritten."""
    places = torch.arange(len(targets), device=targets.device), targets
    made.log_probs[part] = log_softmax[places]
    if made.by_hidden is made.by_weight is made.by_bias is None:
        return
    residual = (
        log_softmax.exp_().neg_()
    )  # onehot - softmax, in place: the log-probabilities of the other tokens are not needed again
    residual[places] += 1
    if scale is not None:
        residual *= scale[part, None]
    residual = residual.to(weight.dtype)
    if made.by_hidden is not None:
        torch.mm(residual, weight, out=made.by_hidden[part])
    if made.by_weight is not None:
        _add_product(made.by_weight, residual.T, hidden[part])
    if made.by_bias is not None:
        made.by_bias.add_(residual.sum(dim=0, dtype=made.by_bias.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without a tensor of the sum's size where the dtypes agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


class _FrozenHeadLogProbs(torch.autograd.Function):
    """Log-probabilities (N,) by a frozen head. Their gradients by the hidden states, (N, D), are all that waits for the backward pass."""

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
        made = _forward_chunks(
            hidden,
            weight,
            bias,
            targets,
            wanted=(True, False, False),
            rows=rows,
            scale=None,
            temperature=temperature,
        )
        ctx.save_for_backward(made.by_hidden)
        ctx.temperature = temperature
        return made.log_probs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (
            (slopes * (upstream[0] / ctx.temperature)[:, None]).to(slopes.dtype),
            None,
            None,
            None,
            None,
            None,
        )


class _TrainedHeadLogProbs(torch.autograd.Function):
    """Log-probabilities (N,) by a head that trains: each of its gradients mixes all tokens', whose weights only the backward pass knows."""

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
            wanted=(False, False, False),
            rows=rows,
            scale=None,
            temperature=temperature,
        ).log_probs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0] / ctx.temperature
        made = _forward_chunks(
            *ctx.saved_tensors,
            wanted=ctx.needs_input_grad[:3],
            rows=ctx.rows,
            scale=scale,
            temperature=ctx.temperature,
        )
        dtype = ctx.saved_tensors[1].dtype
        return *(None if x is None else x.to(dtype) for x in made[1:]), None, None, None


class _TrainedHeadSum(torch.autograd.Function):
    """Sum of the log-probabilities by a head that trains: one upstream number scales all gradients, so they are made at once, the head's as well."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int
    ) -> Tensor:
        made = _forward_chunks(
            hidden,
            weight,
            bias,
            targets,
            wanted=ctx.needs_input_grad[:3],
            rows=rows,
            scale=None,
            temperature=1.0,
        )
        ctx.save_for_backward(*made[1:])
        ctx.dtype = weight.dtype
        return made.log_probs.sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(None if x is None else (x * upstream[0]).to(ctx.dtype) for x in ctx.saved_tensors),
            None,
            None,
        )
