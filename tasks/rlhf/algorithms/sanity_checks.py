"""Check the assumptions of PPO and DPO before training; each error names the likely cause.

Huang et al. 2024 (arXiv 2403.17031) describe how such mistakes spoil a run without an error.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from tasks.rlhf.compute import fsdp


class StepZeroError(RuntimeError):
    """The set-up contradicts an assumption of the algorithm, so further training would be useless."""


def check_close(name: str, actual: Tensor, expected: Tensor, *, tolerance: float, cause: str) -> None:
    """Raise StepZeroError unless ``actual`` and ``expected`` agree to ``tolerance`` everywhere."""
    gap = (actual.float() - expected.float()).abs().max().item() if actual.numel() else 0.0
    if not gap <= tolerance:
        raise StepZeroError(f"{name} differ by {gap:.3g} (allowed: {tolerance:.3g}). Likely cause: {cause}")


def check_ratio(ratio: float, clip_fraction: float, approx_kl: float, *, tolerance: float) -> None:
    """Raise StepZeroError unless the ratio is 1 in the first optimizer step: the policy is still the sampler.

    ``approx_kl`` is half the mean squared log ratio.
    """
    gap = max(abs(ratio - 1), math.sqrt(2 * approx_kl))  # ratios above and below 1 may have mean 1
    if not (gap <= tolerance and clip_fraction == 0):
        raise StepZeroError(
            f"The first mini-batch has mean ratio {ratio:.6f}, log ratios of size {gap:.3g} and clip "
            "fraction "
            f"{clip_fraction:.4f} instead of 1, 0 and 0. Likely cause: dropout is on, or the rollout was "
            "scored with other weights, padding or temperature."
        )


def check_fresh_kl(k1: float, k3: float, *, tolerance: float) -> None:
    """Raise StepZeroError unless the untrained policy equals its reference: mean k1 and k3 are 0."""
    if not (abs(k1) <= tolerance and abs(k3) <= tolerance):
        raise StepZeroError(
            f"An untrained policy is {k1:.3g} (k1) and {k3:.3g} (k3) nats from its reference instead of 0. "
            "Likely cause: the adapter did not start as a no-op, or the reference is another model."
        )


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise StepZeroError if a parameter has no gradient after the first backward pass, or all are zero."""
    missing = [name for name, p in parameters.items() if p.grad is None]
    if missing:
        raise StepZeroError(
            f"{len(missing)} trainable parameters got no gradient, first {missing[0]}. "
            "Likely cause: another adapter was active."
        )
    if not any(bool(p.grad.any()) for p in parameters.values() if p.grad is not None):
        raise StepZeroError(
            "Every gradient is exactly zero. Likely cause: advantages are all equal, or the loss is masked "
            "out."
        )


def check_frozen(parameters: Iterable[Tensor]) -> None:
    """Raise StepZeroError if a frozen parameter got a gradient in the first backward pass."""
    moved = sum(parameter.grad is not None for parameter in parameters)
    if moved:
        raise StepZeroError(
            f"{moved} frozen parameters got a gradient. Likely cause: the reward model or the base was "
            "unfrozen."
        )


def digest(tensors: Iterable[Tensor]) -> str:
    """Return the sha256 of the bytes of tensors, to show that frozen ones did not change.

    Those that are split over ranks are gathered one by one: the digest is that of whole ones.
    """
    result = hashlib.sha256()
    for part in tensors:
        tensor = fsdp.full_tensor(part)
        result.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
