"""Weights that lie in parts on the ranks, with their gradients and optimizer moments (FSDP: Zhao et al. 2023, arXiv 2304.11277; torch's fully_shard).

A layer's weights come together while it computes. The others (embeddings, last norm, output head, of which two may be one tensor) come together
while the root computes, and our losses take hidden states and head apart: so they are computed ``inside`` the model. As that is done by all ranks
together, each must do it as often as every other (``ranks.turns``).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.rlhf.compute import distributed

T = TypeVar("T")
METHOD = "computing"


def shard(model: PreTrainedModel) -> None:
    """Keep only this rank's part of every weight. Gradients are summed over the ranks."""
    mesh = init_device_mesh(model.device.type, (distributed.world(),))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sums with a factor
    vars(model)[METHOD] = lambda compute: compute()
    register_fsdp_forward_method(model, METHOD)


def with_full_weights(model: PreTrainedModel, compute: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``compute(model, *args)`` with whole weights."""
    if not isinstance(model, FSDPModule):
        return compute(model, *args, **kwargs)
    result: T = getattr(model, METHOD)(lambda: compute(model, *args, **kwargs))
    if not torch.is_grad_enabled():
        model.reshard()  # the root waits for a backward pass with its weights whole, and would go on with these
    return result


def num_calls(model: PreTrainedModel, own: int) -> int:
    """How often to call a model that this rank needs ``own`` times: where its weights lie in parts, as often as the rank that needs it most."""
    return max(distributed.all_gather(own)) if isinstance(model, FSDPModule) else own


def gather_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors put together on the first rank, where they lie on the CPU; on the others only what never was in parts is right."""
    return {
        name: _gather_full(tensor) if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def _gather_full(tensor: DTensor) -> Tensor:
    found = tensor.full_tensor()
    return found.detach().cpu() if distributed.is_first() else found.new_empty(0)


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as ``parameter`` is: on its device, and only this rank's part of it."""
    moved = tensor.to(parameter.device)
    return (
        distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
        if isinstance(parameter, DTensor)
        else moved
    )


def clip_grad_norm(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale the gradients so that their norm is at most ``most``; gives what it was."""
    some = list(parameters)
    kinds = [
        kind
        for kind in (
            [p for p in some if isinstance(p, DTensor)],
            [p for p in some if not isinstance(p, DTensor)],
        )
        if kind
    ]
    norms = [torch.nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        torch.nn.utils.clip_grads_with_norm_(kind, most, norm)
    return norm.item()
