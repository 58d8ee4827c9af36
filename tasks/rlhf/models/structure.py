"""Load a model on the first rank only: the other ranks get its structure, with weights on the meta device.

`fsdp.shard` then sends each rank its part of every weight, so no other rank ever holds more than a layer.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import quantised

CPU = torch.device("cpu")


def load_on_first(load: Callable[[], PreTrainedModel], device: torch.device) -> PreTrainedModel:
    """Return what ``load`` returns on the first rank; other ranks get a copy without weights and buffers.

    The scales of a quantised model are on ``device`` there. What ``load`` raises on the first rank ends all.
    """
    model = load() if distributed.is_first() else None
    if distributed.world() > 1:
        structure = distributed.from_first(lambda: _without_weights(model))
        if model is None:
            quantised.move_scales(structure, device)
            return structure
    assert model is not None
    return model


def _without_weights(model: PreTrainedModel | None) -> PreTrainedModel:
    """Return a copy of the model with parameters and buffers on the meta device, and scales on the CPU."""
    assert model is not None
    replaced = {id(tensor): _without_data(tensor) for tensor in (*model.parameters(), *model.buffers())}
    structure = copy.deepcopy(model, replaced)  # instead of these tensors it takes those
    quantised.move_scales(structure, CPU)
    return structure


def _without_data(tensor: Tensor) -> Tensor:
    return fsdp.like_parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor)
