"""Several documents in one block of tokens without any of them seeing another."""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class Document(NamedTuple):
    """Token ids, and for each whether the loss counts predicting it."""

    ids: list[int]
    target: list[bool]


class Blocks(NamedTuple):
    """Packed documents; the model is called with these ids and positions, attention_mask=None and use_cache=False."""

    input_ids: Tensor  # (N, T) int64
    position_ids: Tensor  # (N, T) int64, from 0 in every document
    labels: Tensor  # (N, T) int64: the token itself where the loss counts predicting it, else IGNORE


def pack(documents: list[Document], *, block_tokens: int, pad_id: int) -> Blocks:
    """Whole documents into blocks, first fit in the order given; a document longer than a block is cut to it.

    The first token of a document is nobody's target: it has no left context of its own.
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
            counted = [
                token if counts and i else IGNORE
                for i, (token, counts) in enumerate(zip(*document, strict=True))
            ]
            labels[row, span] = torch.tensor(counted[:length])
            start += length
        # The padding is more documents, without targets and no longer than the others: a model has no more positions
        # than a text needs, and some change their frequencies with the largest.
        longest = min(block_tokens, max(len(documents[index].ids) for index in members))
        positions[row, start:] = torch.arange(block_tokens - start) % longest
    return Blocks(ids, positions, labels)


def first_fit(lengths: list[int], capacity: int, *, open_bins: int = 64) -> list[list[int]]:
    """Indices of each bin; only the newest ``open_bins`` bins are tried, which keeps it linear and the order nearly as given."""
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
