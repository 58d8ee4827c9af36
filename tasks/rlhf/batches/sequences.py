"""Prompts and answers side by side as one padded batch, and what a model says about their tokens."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.rlhf.batches import chunked_log_probs
from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.compute import fsdp

MAX_GROUPS, GROUP_ROWS = 4, 16  # more or smaller groups cost more in calls than they save in padding


class Sequences(NamedTuple):
    """Prompt and answer of each row, padded on the right only: causal attention needs no mask then."""

    input_ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, True on the answer's tokens, the end token included

    def rows(self, indices: Tensor) -> "Sequences":
        """Some rows, with the columns that only the others needed cut off."""
        ids, mask = self.input_ids[indices], self.response_mask[indices]
        width = int(torch.where(mask.any(dim=0))[0].max()) + 1
        return Sequences(ids[:, :width], mask[:, :width])


def join(
    prompts: list[list[int]], answers: list[list[int]], *, pad_id: int, device: torch.device
) -> Sequences:
    """Prompt and answer ids of each row as one batch."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, len(prompt) : end] = True
    return Sequences(ids.to(device), mask.to(device))


def group_by_length(batch: Sequences) -> list[Tensor]:
    """The rows in groups of like length, so that little padding is computed: with one group a third of it is."""
    order = (
        batch.response_mask.flip(1).long().argmax(dim=1).neg().argsort(stable=True)
    )  # by the padding on the right, the most first
    return list(order.chunk(min(MAX_GROUPS, max(1, len(order) // GROUP_ROWS))))


def log_probs(model: PreTrainedModel, batch: Sequences, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of every answer token given what stands before it, (B, T) float32, 0 elsewhere. Logits are made for answer tokens only."""

    def flat(part: Sequences) -> Tensor:
        before = hidden_states(model, part.input_ids)[:, :-1][part.response_mask[:, 1:]]
        targets = part.input_ids[:, 1:][part.response_mask[:, 1:]]
        return chunked_log_probs.log_probs(before, output_head(model), targets, temperature=temperature)

    return _answer_values(batch, flat)


def values(model: PreTrainedModel, head: nn.Linear, batch: Sequences) -> Tensor:
    """Critic: expected final reward before each answer token is chosen, (B, T) float32, 0 elsewhere."""

    def flat(part: Sequences) -> Tensor:
        before = hidden_states(model, part.input_ids)[:, :-1][part.response_mask[:, 1:]]
        return apply_head(head, before)

    return _answer_values(batch, flat)


def scores(model: PreTrainedModel, head: nn.Linear, batch: Sequences) -> Tensor:
    """Reward model: the head at each row's last answer token, (B,) float32."""
    groups = group_by_length(batch)
    missing = fsdp.num_calls(model, len(groups)) - len(groups)  # of calls that ranks with more groups need
    parts = []
    for rows in groups:
        part = batch.rows(rows)
        hidden = hidden_states(model, part.input_ids)
        positions = torch.arange(part.input_ids.shape[1], device=hidden.device)
        last = torch.where(part.response_mask, positions, -1).amax(dim=1)
        parts.append(apply_head(head, hidden[torch.arange(len(hidden), device=hidden.device), last]))
    for _ in range(missing):
        hidden_states(model, batch.input_ids[:1, :1])
    return _restore_order(parts, groups)


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's value of hidden states (N, D) in float32 whatever they are, (N,)."""
    with torch.autocast(hidden.device.type, enabled=False):
        output: Tensor = head(hidden.float())[:, 0]
    return output


def _answer_values(batch: Sequences, flat: Callable[[Sequences], Tensor]) -> Tensor:
    """What ``flat`` says of the answer tokens of some rows, in reading order, for all rows of the batch: (B, T)."""
    width, groups = batch.input_ids.shape[1], group_by_length(batch)
    parts = []
    for rows in groups:
        part = batch.rows(rows)
        parts.append(
            functional.pad(scatter(flat(part), part.response_mask), (0, width - part.input_ids.shape[1]))
        )
    return _restore_order(parts, groups)


def _restore_order(parts: list[Tensor], groups: list[Tensor]) -> Tensor:
    return torch.cat(parts)[torch.cat(groups).argsort()]


def scatter(flat: Tensor, response_mask: Tensor) -> Tensor:
    """Values of the answer tokens in reading order (N,) -> (B, T), 0 elsewhere. No row's first token is an answer token."""
    return torch.zeros(response_mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(
        response_mask, flat
    )
