"""Pack several documents into one block of tokens; position ids that restart keep them apart.

The loss of blocks is that of their documents.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.batches import chunked_log_probs, forward

IGNORE = -100


class Document(NamedTuple):
    """Token ids, and for each whether it is a target of the loss."""

    ids: list[int]
    target: list[bool]


class Blocks(NamedTuple):
    """Packed documents; call the model with attention_mask=None and use_cache=False."""

    input_ids: Tensor  # (N, T) int64
    position_ids: Tensor  # (N, T) int64, from 0 in every document
    labels: Tensor  # (N, T) int64: the token itself if it is a target of the loss, else IGNORE


def pack(documents: list[Document], *, block_tokens: int, pad_id: int) -> Blocks:
    """Pack whole documents into blocks, first fit in their order; a document longer than a block is cut.

    The first token of a document is no target: no token before it predicts it.
    """
    bins = first_fit([min(len(d.ids), block_tokens) for d in documents], block_tokens)
    ids = torch.full((len(bins), block_tokens), pad_id)
    positions = torch.zeros((len(bins), block_tokens), dtype=torch.int64)
    labels = torch.full((len(bins), block_tokens), IGNORE)
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            document = documents[index]
            length = min(len(document.ids), block_tokens)
            span = slice(start, start + length)
            ids[row, span] = torch.tensor(document.ids[:length])
            positions[row, span] = torch.arange(length)
            targets = [
                token if is_target and i else IGNORE
                for i, (token, is_target) in enumerate(zip(*document, strict=True))
            ]
            labels[row, span] = torch.tensor(targets[:length])
            start += length
        # Padding counts as more documents, without targets and no longer than the others: a model may have no
        # larger positions, and some models change their frequencies with the largest one.
        longest = min(block_tokens, max(len(documents[index].ids) for index in members))
        positions[row, start:] = torch.arange(block_tokens - start) % longest
    return Blocks(ids, positions, labels)


def first_fit(lengths: list[int], capacity: int, *, open_bins: int = 64) -> list[list[int]]:
    """Return the indices of each bin.

    Only the newest ``open_bins`` are tried: linear time, and nearly the given order.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        first = max(0, len(bins) - open_bins)
        for candidate in range(first, len(bins)):
            if room[candidate] >= length:
                break
        else:
            candidate = len(bins)
            bins.append([])
            room.append(capacity)
        bins[candidate].append(index)
        room[candidate] -= length
    return bins


def block_loss(
    model: PreTrainedModel, blocks: Blocks, rows: Tensor, device: torch.device, *, count: float
) -> Tensor:
    """Return the sum of the counted next-token losses of blocks ``rows``, divided by ``count``."""
    labels = blocks.labels[rows].to(device)  # (B, T)
    hidden = forward.hidden_states(
        model, blocks.input_ids[rows].to(device), blocks.position_ids[rows].to(device)
    )[:, :-1]  # (B, T - 1, D)
    counted = labels[:, 1:] != IGNORE
    return chunked_log_probs.cross_entropy(
        hidden[counted], forward.output_head(model), labels[:, 1:][counted], count=count
    )
