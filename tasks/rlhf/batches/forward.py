"""Compute a causal language model's last hidden states, for one text in a row or several."""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    PreTrainedModel,
)

from tasks.rlhf.batches import attention_masks


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """Return the last hidden states (B, T, D) of ids (B, T).

    ``visible`` (B, T, T) bool is True where the token of the second index may attend to that of the third;
    layers with a window attend only within it. Without it attention is the model's own causal one, which
    never reaches padding on the right; position ids that restart at 0 in a row begin a new document, which
    attends only to itself.
    """
    mask = None
    if visible is None and position_ids is not None:
        if attention_masks.has_one_text_per_row(model):
            texts = _document_indices(position_ids)
            is_sharded = isinstance(model, FSDPModule)  # its ranks must call it equally often
            hidden = attention_masks.forward_one_text_per_row(
                partial(hidden_states, model), input_ids, texts, in_one_call=is_sharded
            )
            return hidden.view(*input_ids.shape, -1)
        if model.config._attn_implementation in ("sdpa", "eager"):
            visible = _document_mask(position_ids)  # one for all layers; transformers builds one in each
    if visible is not None:
        mask = attention_masks.build_attention_mask(model, visible, position_ids)
    positions = {} if position_ids is None else {"position_ids": position_ids}  # not every model accepts them
    decoder = attention_masks.decoder(model)
    output = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False, **positions)
    last_hidden_state: Tensor = output.last_hidden_state
    return last_hidden_state


def _document_indices(position_ids: Tensor) -> list[list[int]]:
    """Return the flat indices of each document's tokens; documents begin where ``position_ids`` are 0."""
    starts = [*torch.where(position_ids.flatten() == 0)[0].tolist(), position_ids.numel()]
    return [list(range(start, end)) for start, end in pairwise(starts)]


def _document_mask(position_ids: Tensor) -> Tensor:
    """Return True for tokens of the same document up to the token itself, (B, T, T); position_ids (B, T)."""
    document = (position_ids == 0).cumsum(dim=1)
    return (document[:, :, None] == document[:, None, :]).tril()


def output_head(model: PreTrainedModel) -> nn.Module:
    """Return the layer from hidden states to logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head
