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

AdapterState = tuple[object, bool, bool]  # active adapters, whether they are disabled, whether merged


def enable(model: nn.Module) -> None:
    """Make every decoder layer keep only its input for the backward pass and compute the rest again.

    Gradients are bit-equal.

    transformers' own switch works in training mode only, in which the base's dropout is on. This one works
    whenever gradients are on. A forward pass that fills a cache is not changed. Raises InputError if the
    model has no such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no layers that can be computed again in the backward pass: "
            "switch gradient checkpointing off."
        )
    for layer in layers:
        assert "forward" not in vars(layer), "it is on already"
        layer.forward = partial(_forward, layer, layer.forward)


def _forward(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    adapters = _adapter_states(layer)

    def recompute(*args: Any, **kwargs: Any) -> Any:
        assert _adapter_states(layer) == adapters, (
            "backward must be called before the adapters of its forward pass are switched"
        )
        return forward(*args, **kwargs)

    return checkpoint(recompute, *args, use_reentrant=False, **kwargs)


def _adapter_states(layer: nn.Module) -> list[AdapterState]:
    """Return which adapters each matrix of the layer computes with."""
    states = []
    for module in layer.modules():
        if isinstance(module, BaseTunerLayer):
            states.append((module.active_adapters, module.disable_adapters, "forward" in vars(module)))
    return states
