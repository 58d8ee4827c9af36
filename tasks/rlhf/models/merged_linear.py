"""Compute a linear layer with its low-rank adapter as one product, forward and backward.

With W' = W + s B A, kept for a block, y = x W'^T and dL/dx = dL/dy W'. The adapter's gradients need no
gradient of W': dL/dB = s (dL/dy)^T (x A^T) and dL/dA = s (dL/dy B)^T x. The usual way takes three products, a
multiplication and an addition of the layer's output in place of one product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def merged_linear(
    x: Tensor, *, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
) -> Tensor:
    """Return x W'^T + bias, (..., out), of x (..., in); only the adapter and x have gradients.

    ``weight`` (out, in) is W' = W + ``scaling`` * ``up`` (out, r) @ ``down`` (r, in).
    """
    output: Tensor = _MergedLinear.apply(x, weight, bias, down, up, scaling)  # type: ignore[no-untyped-call]
    return output


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, down, up)
        ctx.scaling = scaling
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up = ctx.saved_tensors
        by_x = by_down = by_up = None
        if ctx.needs_input_grad[0]:
            by_x = upstream[0] @ weight
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            rows, by_output = x.flatten(0, -2), upstream[0].flatten(0, -2)  # (N, in), (N, out)
            by_down = (by_output @ (ctx.scaling * up)).T @ rows
            by_up = by_output.T @ (rows @ (ctx.scaling * down.T))
        return by_x, None, None, by_down, by_up, None
