"""Batch prompts with their answers, and compute log_probs, values and scores of the answers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.rlhf.batches import chunked_log_probs
from tasks.rlhf.batches.forward import hidden_states, output_head

MAX_GROUPS, MIN_GROUP_ROWS = 4, 16  # more or smaller groups cost more in calls than they save in padding


class Sequences(NamedTuple):
    """Prompt and answer of each row, padded on the right only, so causal attention needs no mask."""

    input_ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, True on the answer's tokens, the end token included

    def rows(self, indices: Tensor) -> "Sequences":
        """Return some rows, without the columns that only the other rows need."""
        ids, mask = self.input_ids[indices], self.response_mask[indices]
        width = int(torch.where(mask.any(dim=0))[0].max()) + 1
        return Sequences(ids[:, :width], mask[:, :width])


def join(
    prompts: list[list[int]], answers: list[list[int]], *, pad_id: int, device: torch.device
) -> Sequences:
    """Return prompts and answers (token ids) as one batch."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, len(prompt) : end] = True
    return Sequences(ids.to(device), mask.to(device))


def group_by_length(batch: Sequences) -> list[Tensor]:
    """Return the rows in groups of similar length: in a single group a third of all tokens were padding."""
    num_padding = batch.response_mask.flip(1).long().argmax(dim=1)  # on the right
    order = num_padding.neg().argsort(stable=True)  # the shortest rows first
    return list(order.chunk(min(MAX_GROUPS, max(1, len(order) // MIN_GROUP_ROWS))))


def log_probs(model: PreTrainedModel, batch: Sequences, *, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of every answer token given those before it, (B, T) float32, 0 elsewhere.

    Logits are computed for answer tokens only.
    """

    def answer_log_probs(part: Sequences) -> Tensor:
        before = hidden_states(model, part.input_ids)[:, :-1][part.response_mask[:, 1:]]
        targets = part.input_ids[:, 1:][part.response_mask[:, 1:]]
        return chunked_log_probs.log_probs(before, output_head(model), targets, temperature=temperature)

    return _map_answer_tokens(batch, answer_log_probs)


def values(model: PreTrainedModel, head: nn.Linear, batch: Sequences) -> Tensor:
    """Return the critic's value before each answer token is chosen, (B, T) float32, 0 elsewhere."""

    def answer_values(part: Sequences) -> Tensor:
        before = hidden_states(model, part.input_ids)[:, :-1][part.response_mask[:, 1:]]
        return apply_head(head, before)

    return _map_answer_tokens(batch, answer_values)


def scores(model: PreTrainedModel, head: nn.Linear, batch: Sequences) -> Tensor:
    """Return the reward model's head at each row's last answer token, (B,) float32."""
    groups = group_by_length(batch)
    parts = []
    for rows in groups:
        part = batch.rows(rows)
        hidden = hidden_states(model, part.input_ids)
        positions = torch.arange(part.input_ids.shape[1], device=hidden.device)
        last = torch.where(part.response_mask, positions, -1).amax(dim=1)
        parts.append(apply_head(head, hidden[torch.arange(len(hidden), device=hidden.device), last]))
    return _restore_order(parts, groups)


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Return the head's values (N,) of hidden states (N, D), in float32 whatever their dtype."""
    with torch.autocast(hidden.device.type, enabled=False):
        output: Tensor = head(hidden.float())[:, 0]
    return output


def _map_answer_tokens(batch: Sequences, compute: Callable[[Sequences], Tensor]) -> Tensor:
    """Return (B, T) with the values, (N,) in reading order, that ``compute`` returns for answer tokens."""
    width, groups = batch.input_ids.shape[1], group_by_length(batch)
    parts = []
    for rows in groups:
        part = batch.rows(rows)
        values = scatter(compute(part), part.response_mask)
        parts.append(functional.pad(values, (0, width - part.input_ids.shape[1])))
    return _restore_order(parts, groups)


def _restore_order(parts: list[Tensor], groups: list[Tensor]) -> Tensor:
    return torch.cat(parts)[torch.cat(groups).argsort()]


def scatter(flat: Tensor, response_mask: Tensor) -> Tensor:
    """Put values of the answer tokens in reading order (N,) into (B, T), 0 elsewhere.

    No row's first token is an answer token.
    """
    return torch.zeros(response_mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(
        response_mask, flat
    )
