"""Compute the next-token loss of packed documents."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.batches import chunked_log_probs, forward
from tasks.rlhf.batches.packing import IGNORE, Blocks


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
