"""Compute the log-probabilities of answer tokens together with the entropy of their distributions.

The entropy is exact, over the whole vocabulary. The mean of -log p of the sampled tokens estimates the same
number, but its gradient is no gradient of the entropy: in expectation it is 0.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tasks.rlhf.batches.chunked_log_probs import chunk_rows
from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.batches.sequences import Sequences, scatter


def log_probs_and_entropy(
    model: PreTrainedModel, batch: Sequences, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy (nats) at every answer token, (B, T) float32 each, 0 elsewhere.

    Both are of the distribution at ``temperature`` from which the token was drawn, and can be differentiated.
    """
    mask = batch.response_mask
    before = hidden_states(model, batch.input_ids)[:, :-1][mask[:, 1:]]
    targets = batch.input_ids[:, 1:][mask[:, 1:]]
    logp, entropy = at_targets(before, output_head(model), targets, temperature=temperature)
    return scatter(logp, mask), scatter(entropy, mask)


def at_targets(
    hidden: Tensor, head: nn.Module, targets: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and the entropy, given the hidden state before, (N,) each.

    hidden (N, D), targets (N,) in [0, V). Logits exist for ``chunk`` rows at a time (default: by a budget of
    bytes): each chunk's are computed a second time in the backward pass.
    """
    size = head.out_features
    assert isinstance(size, int)
    rows = chunk_rows(len(targets), size, device=hidden.device, chunk=chunk)
    recompute = partial(checkpoint, use_reentrant=False)
    parts = [
        recompute(_chunk, part, head, wanted, temperature)
        for part, wanted in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    logp, entropy = map(torch.cat, zip(*parts, strict=True))
    return logp, entropy


def _chunk(hidden: Tensor, head: nn.Module, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_softmax = functional.log_softmax(logits, dim=1)
    probabilities = log_softmax.exp()
    # a token that cannot be drawn adds nothing: 0 * -inf would be NaN
    terms = torch.where(probabilities > 0, probabilities * log_softmax, 0.0)
    return log_softmax.gather(1, targets[:, None])[:, 0], -terms.sum(dim=1)
