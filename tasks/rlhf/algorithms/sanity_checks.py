"""Checks at the start of policy optimisation. Each failure names its likely cause; passing them rules out the silent mistakes of RLHF."""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class StepZeroError(RuntimeError):
    """The set-up contradicts what the algorithm assumes; training on would waste the run."""


def check_close(name: str, actual: Tensor, expected: Tensor, *, tolerance: float, cause: str) -> None:
    """``actual`` and ``expected`` must agree to ``tolerance`` everywhere."""
    gap = (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0
    if not gap <= tolerance:
        raise StepZeroError(f"{name} differ by {gap:.3g} (allowed: {tolerance:.3g}). Likely cause: {cause}")


def check_ratio(ratio: float, clip_fraction: float, approx_kl: float, *, tolerance: float) -> None:
    """The first optimizer step after a rollout sees the very policy that sampled it. ``approx_kl`` is half the mean squared log ratio."""
    gap = max(abs(ratio - 1), math.sqrt(2 * approx_kl))  # ratios off to both sides have mean 1
    if not (gap <= tolerance and clip_fraction == 0):
        raise StepZeroError(
            f"The first mini-batch has mean ratio {ratio:.6f}, log ratios of size {gap:.3g} and clip fraction {clip_fraction:.4f} instead of 1, 0 "
            "and 0. Likely cause: dropout is on, or the rollout was scored with other weights, padding or temperature."
        )


def check_fresh_kl(k1: float, k3: float, *, tolerance: float) -> None:
    """An untrained adapter is the reference."""
    if not (abs(k1) <= tolerance and abs(k3) <= tolerance):
        raise StepZeroError(
            f"An untrained policy is {k1:.3g} (k1) and {k3:.3g} (k3) nats from its reference instead of 0. "
            "Likely cause: the adapter did not start as a no-op, or the reference is another model."
        )


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """After the first backward every trainable parameter has a gradient, and not all of them are zero."""
    missing = [name for name, p in parameters.items() if p.grad is None]
    if missing:
        raise StepZeroError(
            f"{len(missing)} trainable parameters got no gradient, first {missing[0]}. Likely cause: another adapter was active."
        )
    if not any(bool(p.grad.any()) for p in parameters.values() if p.grad is not None):
        raise StepZeroError(
            "Every gradient is exactly zero. Likely cause: advantages are all equal, or the loss is masked out."
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 over the bytes of some tensors: frozen ones must end as they began."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
