"""Raise an error on NaN and infinity that names the step and the first quantity that had them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tasks.system.errors import InputError

DIVERGED = "training has diverged; lower learning_rate"
UNSOUND_MODEL = "the model cannot be computed with; train it again or choose another precision (weights.*)"


def check_finite(
    values: Mapping[str, Tensor | float], *, step: int | None = None, advice: str = DIVERGED
) -> None:
    """Raise InputError for the first of the named ``values`` that is not finite; list causes before their
    effects.
    """
    for name, value in values.items():
        if isinstance(value, Tensor):
            bad = value.detach()[~value.detach().isfinite()]
            if not len(bad):
                continue
            shown = f"{bad[0].item()} ({len(bad)} of {value.numel()} values)"
        elif math.isfinite(value):
            continue
        else:
            shown = str(value)
        when = f" in step {step}" if step is not None else ""
        raise InputError(f"{name[0].upper()}{name[1:]} is {shown}{when}: {advice}.")


def check_weights(parameters: Mapping[str, nn.Parameter], *, step: int | None = None) -> None:
    """Raise InputError if a trained weight is not finite."""
    for name, parameter in parameters.items():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not bool(torch.isfinite(local).all()):
            check_finite({f"the weight {name}": local.flatten()}, step=step)
