"""Shard weights, gradients and optimizer moments over the ranks (FSDP: Zhao et al. 2023, arXiv 2304.11277).

A layer's weights are gathered while it computes. The others (embeddings, last norm, output head, two of which
may be one tensor) are gathered while the root module computes. Our losses use hidden states and head
separately, so they are computed within the root: `with_full_weights`. All ranks gather together. Each must
enter that block equally often (`distributed.padded_steps`), but within it may call the model as often as it
likes: each call is announced, and a rank that has finished takes part in the others' calls with one token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tasks.rlhf.compute import distributed

T = TypeVar("T")
P = ParamSpec("P")
METHOD = "compute_with_full_weights"
SILENT = "_alignflow_takes_part_in_a_call"  # attribute of a decoder whose call is not announced


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Keep only this rank's part of every weight of ``model``, on ``device``, where one layer at a time is
    whole. Gradients are summed over the ranks.
    """
    mesh = init_device_mesh(device.type, (distributed.world(),))
    for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sums with a factor
    vars(model)[METHOD] = lambda compute: compute()
    register_fsdp_forward_method(model, METHOD)
    model.get_decoder().register_forward_pre_hook(_announce)


def with_full_weights(
    model: PreTrainedModel,
    compute: Callable[Concatenate[PreTrainedModel, P], T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Return ``compute(model, *args, **kwargs)``, computed with all weights gathered.

    ``compute`` takes part in no other communication of the ranks. A result that has gradients is a tensor, or
    a tuple that begins with one, and all ranks go backward from it.
    """
    if not isinstance(model, FSDPModule):
        return compute(model, *args, **kwargs)

    def compute_and_wait() -> T:
        result = compute(model, *args, **kwargs)
        others = [_call_with_one_token(model) for _ in _calls_of_others()]
        return _depend_on(result, others) if others and _has_gradients(result) else result

    result: T = getattr(model, METHOD)(compute_and_wait)
    if not _has_gradients(result):
        model.reshard()  # the root keeps gathered weights for a backward pass; later they would be outdated
    return result


def _announce(decoder: nn.Module, _: object) -> None:
    """Tell the other ranks that this one calls the model."""
    if not vars(decoder).get(SILENT):
        distributed.all_reduce([1.0])


def _calls_of_others() -> Iterator[None]:
    """Yield for each call of the model by another rank, until all ranks have finished theirs."""
    while distributed.all_reduce([0.0])[0]:
        yield


def _call_with_one_token(model: PreTrainedModel) -> Tensor:
    """Take part in another rank's call. Return the last hidden state, which belongs to nothing."""
    decoder = model.get_decoder()
    vars(decoder)[SILENT] = True
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        hidden: Tensor = decoder(input_ids=token, use_cache=False).last_hidden_state
    finally:
        del vars(decoder)[SILENT]
    return hidden


def _has_gradients(result: object) -> bool:
    first = result[0] if isinstance(result, tuple) else result
    return isinstance(first, Tensor) and first.requires_grad


def _depend_on(result: T, others: list[Tensor]) -> T:
    """Return ``result``, whose backward pass goes through ``others`` too, with gradients of 0."""
    if isinstance(result, tuple):
        return (_depend_on(result[0], others), *result[1:])  # type: ignore[return-value]
    assert isinstance(result, Tensor)
    nothing = 0 * torch.stack([hidden.sum() for hidden in others]).sum()
    return result + nothing.to(result.dtype)  # type: ignore[return-value]


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, of which each rank may hold a part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the full tensors on the first rank, on the CPU if sharded; other ranks get empty ones."""
    return {name: _gather_full(tensor) for name, tensor in tensors.items()}


def _gather_full(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.detach().cpu() if distributed.is_first() else full.new_empty(0)


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a full tensor on the device of ``parameter``, and only this rank's part if that is sharded."""
    moved = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return moved
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients so that their norm is at most ``max_norm``. Return the norm before clipping."""
    sharded: list[nn.Parameter] = []
    full: list[nn.Parameter] = []
    for parameter in parameters:
        (sharded if isinstance(parameter, DTensor) else full).append(parameter)
    groups = [group for group in (sharded, full) if group]
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(full_tensor(norm))
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return total.item()
