"""Shard weights, gradients and optimizer moments over the ranks (FSDP: Zhao et al. 2023, arXiv 2304.11277).

A layer's weights are gathered while it computes, and so are input embeddings. The others (last norm, output
head, embeddings tied to it) are gathered while the root module computes. Our losses use hidden states and
head separately, so they are computed within the root: `with_full_weights`. All ranks gather together. Each
must enter that block equally often (`distributed.padded_steps`), but within it may call the model as often as
it likes: each call is announced, and a rank that has finished takes part in the others' calls with one token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tasks.rlhf.compute import distributed

T = TypeVar("T")
P = ParamSpec("P")
PLAIN = (bool, int, str, torch.dtype)
METHOD = "compute_with_full_weights"
COMPUTE_DTYPE = "_alignflow_compute_dtype"  # attribute of a sharded model
EMBEDDING = "_alignflow_embedding"  # attribute of a sharded model: the input embedding, if not tied
SILENT = "_alignflow_takes_part_in_a_call"  # attribute of a decoder whose call is not announced


def shard(model: PreTrainedModel, device: torch.device, *, compute_dtype: torch.dtype | None = None) -> None:
    """Keep only this rank's part of every weight of ``model``, on ``device``, where one layer at a time is
    whole. Gradients are summed over the ranks.

    Weights and buffers are the first rank's: those of the others may be on the meta device. With
    ``compute_dtype`` the weights are kept in float32 and matrix products computed in that type, in which a
    layer's matrices are also sent; then its other weights, such as norms, stay whole on every rank.
    """
    mesh = init_device_mesh(device.type, (distributed.world(),))
    kept_in = None if compute_dtype is None else torch.float32
    sent: set[nn.Module] = set()
    whole: set[nn.Parameter] = set()
    for unit in _units(model):
        _send_weights(unit, sent, device, kept_in)
        policy = MixedPrecisionPolicy()
        if compute_dtype is not None and isinstance(unit, GradientCheckpointingLayer):
            policy, others = _precision_of_gathers(unit, compute_dtype)
            whole |= others
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no sums with a factor
    vars(model)[METHOD] = lambda compute: compute()
    register_fsdp_forward_method(model, METHOD)
    if compute_dtype is not None:
        vars(model)[COMPUTE_DTYPE] = compute_dtype
    model.get_decoder().register_forward_pre_hook(_announce)


def _units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose weights are gathered together; the last one has all that is left."""
    units: list[nn.Module] = []
    units += [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Module)
        and embedding.weight is not head.weight
    ):
        vars(model)[EMBEDDING] = embedding  # not as a module, of which it would be a second one
        units.append(embedding)
    return [*units, model]


@torch.no_grad()
def _send_weights(
    unit: nn.Module, sent: set[nn.Module], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Replace weights and buffers of ``unit`` by the first rank's, on ``device``; floating ones in ``dtype``.

    ``sent`` are the modules whose weights have been sent; those of ``unit`` are added.
    """
    arrived: dict[Tensor, Tensor] = {}  # a tied weight is sent once
    for module in unit.modules():
        if module in sent:
            continue
        sent.add(module)
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in arrived:
                    arrived[tensor] = like_parameter(_send(tensor.data, device, dtype), tensor)
                tensors[name] = None if tensor is None else arrived[tensor]  # type: ignore[assignment]


def _send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    if distributed.is_first():
        here = tensor.to(device).contiguous()
    else:
        here = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    dist.broadcast(here.flatten().view(torch.uint8), 0)  # gloo has no booleans
    return here.to(dtype) if dtype is not None and here.is_floating_point() else here


def like_parameter(data: Tensor, original: Tensor) -> Tensor:
    """Return ``data`` as a parameter or buffer, as ``original`` is, with its attributes that are no tensors:
    peft and bitsandbytes read those of quantised weights.
    """
    if not isinstance(original, nn.Parameter):
        return data
    parameter = nn.Parameter(data, requires_grad=original.requires_grad)
    vars(parameter).update({key: value for key, value in vars(original).items() if isinstance(value, PLAIN)})
    return parameter


def _precision_of_gathers(
    layer: nn.Module, compute_dtype: torch.dtype
) -> tuple[MixedPrecisionPolicy, set[nn.Parameter]]:
    """Return in which type a layer's weights are gathered, and which of them stay whole on every rank.

    Autocast computes with matrices in ``compute_dtype`` and with norms in float32, so what is computed is the
    same to the bit. Whether it converts a larger weight that is in no linear layer, such as the experts of a
    mixture, is not known: a layer with one is gathered in float32.
    """
    matrices: set[nn.Parameter] = set()
    for module in layer.modules():
        if type(module) in (nn.Linear, Conv1D):
            matrices |= set(module.parameters())
    others = set(layer.parameters()) - matrices
    if compute_dtype == torch.float32 or any(parameter.dim() > 1 for parameter in others):
        return MixedPrecisionPolicy(), set()
    gathered = MixedPrecisionPolicy(compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return gathered, others


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the type of the model's matrix products, which that of sharded weights may not be."""
    dtype: torch.dtype = vars(model).get(COMPUTE_DTYPE, model.dtype)
    return dtype


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
        with _autocast(model):
            result = compute(model, *args, **kwargs)
            others = [_call_with_one_token(model) for _ in _calls_of_others()]
        return _depend_on(result, others) if others and _has_gradients(result) else result

    embedding = vars(model).get(EMBEDDING)
    if embedding is not None:  # while sampling it is gathered once, and not for each token
        embedding.set_reshard_after_forward(torch.is_grad_enabled())
    try:
        result: T = getattr(model, METHOD)(compute_and_wait)
    except Exception:
        model.reset_iter_state()  # checks call a model again that fails on all ranks
        raise
    if not _has_gradients(result):
        # weights stay gathered for a backward pass; later they would be outdated
        for unit in (model, embedding):
            if unit is not None:
                unit.reshard()
    return result


def _autocast(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Return a context in which the products of weights that are kept in float32 have their own type."""
    dtype = vars(model).get(COMPUTE_DTYPE, torch.float32)
    return nullcontext() if dtype == torch.float32 else torch.autocast(model.device.type, dtype)


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
