"""Pack several documents into one block of tokens; position ids that restart keep them apart.

The loss of blocks is that of their documents.
"""

from collections.abc import Iterable, Sequence
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


class PackedDocuments(NamedTuple):
    """Which documents each block holds; tensors are made only of the blocks that are used."""

    documents: Sequence[Document]
    bins: list[list[int]]  # by block: the indices of its documents
    lengths: list[int]  # by document: its tokens in a block
    block_tokens: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.bins)

    def blocks(self, rows: Iterable[int]) -> Blocks:
        """Return some blocks."""
        chosen = [self.bins[row] for row in rows]
        ids = torch.full((len(chosen), self.block_tokens), self.pad_id)
        positions = torch.zeros(ids.shape, dtype=torch.int64)
        labels = torch.full(ids.shape, IGNORE)
        for row, members in enumerate(chosen):
            start = 0
            for index in members:
                end = start + self.lengths[index]
                self._fill(index, ids[row, start:end], positions[row, start:end], labels[row, start:end])
                start = end
            rest = self.block_tokens - start
            positions[row, start:] = torch.arange(rest) % self._longest(members)
        return Blocks(ids, positions, labels)

    def _fill(self, index: int, ids: Tensor, positions: Tensor, labels: Tensor) -> None:
        """Write a document into its part of a block."""
        document = self.documents[index]
        ids[:] = torch.tensor(document.ids[: len(ids)])
        positions[:] = torch.arange(len(ids))
        is_target = torch.tensor(document.target[: len(ids)])
        is_target[0] = False  # no token before it predicts it
        labels[is_target] = ids[is_target]

    def _longest(self, members: list[int]) -> int:
        """Return the length of padding's documents.

        Padding counts as more documents, without targets and no longer than the others: a model may have no
        larger positions, and some models change their frequencies with the largest one.
        """
        return max(self.lengths[index] for index in members)

    def num_targets(self) -> int:
        """Return the number of tokens that the loss counts in all blocks."""
        documents = zip(self.documents, self.lengths, strict=True)
        return sum(sum(document.target[1:length]) for document, length in documents)

    def hardest(self) -> Blocks:
        """Return the blocks on which a wrong mask shows most: with the longest document, and with most."""
        longest = max(range(len(self)), key=lambda row: self._longest(self.bins[row]))
        fullest = max(range(len(self)), key=lambda row: self._num_documents(self.bins[row]))
        return self.blocks(dict.fromkeys((longest, fullest)))

    def _num_documents(self, members: list[int]) -> int:
        rest = self.block_tokens - sum(self.lengths[index] for index in members)
        return len(members) + -(-rest // self._longest(members))


def pack_documents(
    documents: Sequence[Document], lengths: Sequence[int], *, block_tokens: int, pad_id: int
) -> PackedDocuments:
    """Assign whole documents to blocks, first fit in their order; a document longer than a block is cut.

    ``lengths`` are the documents' numbers of tokens.
    """
    kept = [min(length, block_tokens) for length in lengths]
    bins = first_fit(kept, block_tokens)
    return PackedDocuments(documents, bins, kept, block_tokens, pad_id)


def pack(documents: Sequence[Document], *, block_tokens: int, pad_id: int) -> Blocks:
    """Return all blocks of some documents."""
    lengths = [len(document.ids) for document in documents]
    packed = pack_documents(documents, lengths, block_tokens=block_tokens, pad_id=pad_id)
    return packed.blocks(range(len(packed)))


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
