"""Measure the perplexity of held-out texts, and how much higher it is under one model than under another.

All models read the same tokens, so differences are paired by text: the intervals redraw texts, each with its
losses under both models.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.batches import sequences
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.evaluation.answer_scores import Answer, score_answers
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.pair_accuracy import DRAWS


class Texts(NamedTuple):
    """Held-out texts: a prompt, and the text after it whose tokens are counted."""

    parts: list[Answer]  # prompt and counted token ids
    tokens: Tensor  # (N,) float64, counted tokens of each text
    bytes: Tensor  # (N,) float64, UTF-8 bytes that they stand for


@torch.no_grad()
def text_losses(
    model: PreTrainedModel,
    texts: Texts,
    *,
    pad_id: int,
    batch_size: int,
    report_progress: Callable[[int, int], None],
) -> Tensor:
    """Return the negative log-likelihood of each text's counted tokens, in nats, (N,) float64 on the CPU."""

    def loss(batch: Sequences) -> Tensor:
        return -sequences.log_probs(model, batch).double().sum(dim=1)

    return score_answers(
        loss,
        texts.parts,
        pad_id=pad_id,
        device=model.device,
        batch_size=batch_size,
        report_progress=report_progress,
    )


def perplexity(losses: Tensor, tokens: Tensor) -> Interval:
    """Return exp(nats per token) with its 95 % interval. losses (N,), tokens (N,); n is the number of texts.

    A long text counts more than a short one, as in the perplexity of the texts joined into one.
    """
    rate, low, high = _redrawn_ratio(losses, tokens)
    return Interval(math.exp(rate), math.exp(low), math.exp(high), len(losses))


def bits_per_byte(losses: Tensor, num_bytes: Tensor) -> Interval:
    """Return bits per byte of text, which does not depend on the tokenizer. losses (N,), num_bytes (N,)."""
    rate, low, high = (nats / math.log(2) for nats in _redrawn_ratio(losses, num_bytes))
    return Interval(rate, low, high, len(losses))


def perplexity_increase(ours: Tensor, theirs: Tensor, tokens: Tensor) -> Interval:
    """Return by how many per cent the perplexity of ``ours`` is above that of ``theirs``, all (N,).

    It is higher, which is worse, if ``low`` is above 0.
    """
    increase, low, high = (100 * math.expm1(nats) for nats in _redrawn_ratio(ours - theirs, tokens))
    return Interval(increase, low, high, len(ours))


def _redrawn_ratio(sums: Tensor, counts: Tensor, *, seed: int = 0) -> tuple[float, float, float]:
    """Return sum(sums) / sum(counts) and the ends of its 95 % percentile bootstrap interval over texts.

    The draws depend on the number of texts alone. One text has no variance: the interval is unbounded.
    """
    assert sums.shape == counts.shape
    sums, counts = sums.double(), counts.double()
    ratio = (sums.sum() / counts.sum()).item()
    if len(sums) < 2:
        return ratio, -math.inf, math.inf
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(sums), (len(sums),), generator=generator) for _ in range(DRAWS))
    ratios = torch.stack([sums[rows].sum() / counts[rows].sum() for rows in drawn])
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ratio, low, high
