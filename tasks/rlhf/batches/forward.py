"""Run a causal language model on a batch up to its last hidden states."""

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
    """Last hidden states (B, T, D) of ids (B, T).

    ``visible`` (B, T, T) bool says which places each place may see; layers with a window see those inside it. Without
    it attention is the model's own, which keeps padding on the right out, and if ``position_ids`` start anew in a row
    so does attention.
    """
    mask = None
    if visible is None and position_ids is not None:
        if attention_masks.has_one_text_per_row(model):
            texts = _document_indices(position_ids)
            together = isinstance(model, FSDPModule)  # its ranks must call it equally often
            found = attention_masks.forward_one_text_per_row(
                partial(hidden_states, model), input_ids, texts, in_one_call=together
            )
            return found.view(*input_ids.shape, -1)
        if model.config._attn_implementation in ("sdpa", "eager"):
            visible = _document_mask(
                position_ids
            )  # one mask for all layers; transformers makes one in each of them
    if visible is not None:
        mask = attention_masks.build_attention_mask(model, visible, position_ids)
    told = (
        {} if position_ids is None else {"position_ids": position_ids}
    )  # not every model can be told positions
    decoder = attention_masks.decoder(model)
    output: Tensor = decoder(
        input_ids=input_ids, attention_mask=mask, use_cache=False, **told
    ).last_hidden_state
    return output


def _document_indices(position_ids: Tensor) -> list[list[int]]:
    """Places of each document, counted through the rows (B, T); documents begin where ``position_ids`` are 0."""
    starts = [*torch.where(position_ids.flatten() == 0)[0].tolist(), position_ids.numel()]
    return [list(range(start, end)) for start, end in pairwise(starts)]


def _document_mask(position_ids: Tensor) -> Tensor:
    """Which places each place sees of its own document up to itself, (B, T, T) bool; documents begin where ``position_ids`` (B, T) are 0."""
    document = (position_ids == 0).cumsum(dim=1)
    return (document[:, :, None] == document[:, None, :]).tril()


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer from hidden states to logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head
