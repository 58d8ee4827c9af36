"""Recompute decoder layers in the backward pass instead of keeping their activations."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.system.errors import InputError


def enable(model: nn.Module) -> None:
    """From now on a decoder layer keeps its input alone for the backward pass, which computes the rest again: bit for bit the same gradients.

    transformers' own switch works in training mode only, where the base's dropout is on. This one asks whether gradients are on. A forward pass that
    fills a cache is left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layers that can be computed again in the backward pass: switch gradient checkpointing off."
        )
    for layer in layers:
        assert "forward" not in vars(layer), "it is on already"
        layer.forward = partial(_recompute, layer, layer.forward)


def _recompute(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    before = _adapter_states(layer)

    def again(*args: Any, **kwargs: Any) -> Any:
        assert _adapter_states(layer) == before, (
            "backward must be called before the adapters of its forward pass are switched"
        )
        return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


def _adapter_states(layer: nn.Module) -> list[object]:
    """What the layer's matrices compute with: the active adapters, none, or one folded in."""
    tuned = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    return [(module.active_adapters, module.disable_adapters, "forward" in vars(module)) for module in tuned]
