"""Optimise matrices with Muon: momentum is orthogonalised (singular values about 1) before each update."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # of x -> ax + bx^3 + cx^5, which moves a singular value to 1 the fastest
ITERATIONS = 3  # torch's Muon takes 5; on the built-in base 3 learn the same (docs/design.md)
RMS = 0.2  # of an update's elements, as AdamW's have, so both take one learning rate (Liu et al. 2025, eq. 4)


class Muon(Optimizer):
    """Muon of Jordan et al. 2024, scaled as by Liu et al. 2025 (arXiv 2502.16982), with decoupled decay.

    It is for the matrices between embedding and head. torch.optim.Muon orthogonalises one matrix after
    another in bfloat16, which takes a CPU longer than the rest of the step; here all matrices of one shape
    are one batch, in float32.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        assert all(p.dim() == 2 for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, with Nesterov momentum."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=torch.float32)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad.float(), 1 - group["momentum"])
                momentum = p.grad.float().lerp(buffer, group["momentum"])
                by_shape.setdefault(tuple(p.shape), []).append((p, momentum))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([momentum for _, momentum in pairs]))
                step_size = -group["lr"] * RMS * max(rows, columns) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=step_size)


def orthogonalise(matrices: Tensor, *, iterations: int = ITERATIONS) -> Tensor:
    """Return about U V' of each matrix U S V', (B, M, N), by Newton-Schulz: singular values 0.5 to 1.5."""
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x: Tensor = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b g + c g g
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + (b g + c g g) x
    return x if wide is matrices else x.mT
