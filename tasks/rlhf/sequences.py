"""Prompts and answers side by side as one padded batch, and what a model says about their tokens."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tasks.rlhf.models import hidden_states, output_head


class Sequences(NamedTuple):
    """Prompt and answer of each row, padded on the right only: causal attention needs no mask then."""

    input_ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, True on the answer's tokens, the end token included

    def rows(self, indices: Tensor) -> "Sequences":
        """Some rows, with the columns that only the others needed cut off."""
        ids, mask = self.input_ids[indices], self.response_mask[indices]
        width = int(torch.where(mask.any(dim=0))[0].max()) + 1
        return Sequences(ids[:, :width], mask[:, :width])


def join(prompts: list[list[int]], answers: list[list[int]], *, pad_id: int, device: torch.device) -> Sequences:
    """Prompt and answer ids of each row as one batch."""
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, len(prompt) : end] = True
    return Sequences(ids.to(device), mask.to(device))


def log_probs(model: PreTrainedModel, batch: Sequences, *, temperature: float = 1.0, chunk: int = 4096) -> Tensor:
    """Log-probability of every answer token given what stands before it, (B, T) float32, 0 elsewhere.

    Logits are made for answer tokens only, ``chunk`` of them at a time when no gradient is wanted.
    """
    before = hidden_states(model, batch.input_ids)[:, :-1][batch.response_mask[:, 1:]]
    targets = batch.input_ids[:, 1:][batch.response_mask[:, 1:]]
    size = len(targets) if torch.is_grad_enabled() else chunk
    parts = [_gather(output_head(model), h, t, temperature) for h, t in zip(before.split(size), targets.split(size), strict=True)]
    return scatter(torch.cat(parts), batch.response_mask)


def _gather(head: nn.Module, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = head(hidden).float() / temperature
    chosen: Tensor = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)
    return chosen


def values(model: PreTrainedModel, head: nn.Linear, batch: Sequences) -> Tensor:
    """Critic: expected final reward before each answer token is chosen, (B, T) float32, 0 elsewhere."""
    before = hidden_states(model, batch.input_ids)[:, :-1][batch.response_mask[:, 1:]]
    return scatter(head(before.float())[:, 0], batch.response_mask)


def scores(model: PreTrainedModel, head: nn.Linear, batch: Sequences) -> Tensor:
    """Reward model: the head at each row's last answer token, (B,) float32."""
    hidden = hidden_states(model, batch.input_ids)
    positions = torch.arange(batch.input_ids.shape[1], device=hidden.device)
    last = torch.where(batch.response_mask, positions, -1).amax(dim=1)
    output: Tensor = head(hidden[torch.arange(len(hidden), device=hidden.device), last].float())[:, 0]
    return output


def scatter(flat: Tensor, response_mask: Tensor) -> Tensor:
    """Values of the answer tokens in reading order (N,) -> (B, T), 0 elsewhere. No row's first token is an answer token."""
    return torch.zeros(response_mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(response_mask, flat)
