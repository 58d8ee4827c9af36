"""Compute a causal language model's last hidden states, for one text in a row or several."""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from tasks.rlhf.batches import attention_masks
from tasks.rlhf.batches.attention_masks import Segments


def hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Return the last hidden states (B, T, D) of ids (B, T).

    ``segments`` say which tokens of a row belong together; layers with a window attend only within it.
    Without them attention is the model's own causal one, which never reaches padding on the right; position
    ids that restart at 0 in a row begin a new document, which attends only to itself.
    """
    if position_ids is None:
        assert segments is None, "segments need positions"
        return _call(model, input_ids, None)
    implementation = model.config._attn_implementation
    if segments is not None:
        if implementation.startswith(attention_masks.FLASH):
            raise ValueError("FlashAttention has no mask for answers that share a prompt")
        mask = attention_masks.build_attention_mask(model, segments, position_ids)
        return _call(model, input_ids, mask, position_ids=position_ids)
    if attention_masks.has_one_text_per_row(model):
        texts = _document_indices(position_ids)
        is_sharded = isinstance(model, FSDPModule)  # its ranks must call it equally often
        hidden = attention_masks.forward_one_text_per_row(
            partial(hidden_states, model), input_ids, texts, in_one_call=is_sharded
        )
        return hidden.view(*input_ids.shape, -1)
    if implementation.startswith(attention_masks.FLASH):
        return _packed_by_lengths(model, input_ids, position_ids)
    # one mask for all layers; transformers builds one in each
    mask = attention_masks.build_attention_mask(model, attention_masks.documents(position_ids), position_ids)
    return _call(model, input_ids, mask, position_ids=position_ids)


def _packed_by_lengths(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Compute all rows as one: transformers finds the documents for FlashAttention only in a single row."""
    row = position_ids.reshape(1, -1)
    lengths = attention_masks.document_lengths(row)
    hidden = _call(model, input_ids.reshape(1, -1), None, position_ids=row, **lengths)
    return hidden.view(*input_ids.shape, -1)


def _call(
    model: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | BlockMask | dict[str, Tensor | BlockMask] | None,
    **layout: Any,  # position ids only if there are some: not every model accepts them
) -> Tensor:
    decoder = attention_masks.decoder(model)
    output = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False, **layout)
    last_hidden_state: Tensor = output.last_hidden_state
    return last_hidden_state


def _document_indices(position_ids: Tensor) -> list[list[int]]:
    """Return the flat indices of each document's tokens; documents begin where ``position_ids`` are 0."""
    starts = [*torch.where(position_ids.flatten() == 0)[0].tolist(), position_ids.numel()]
    return [list(range(start, end)) for start, end in pairwise(starts)]


def output_head(model: PreTrainedModel) -> nn.Module:
    """Return the layer from hidden states to logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head
