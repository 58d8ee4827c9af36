"""Compare several texts in one row, packed or sharing a prompt, with the model's plain forward pass on each text alone.

Run before training, on the texts that are hardest for a wrong mask: the longest, and rows of many. A model that fails
is computed text by text from then on; one that fails even then is refused.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.batches import attention_masks, chunked_log_probs, forward, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison, evenly_spaced
from tasks.rlhf.batches.packing import Blocks
from tasks.rlhf.compute import distributed
from tasks.system.errors import InputError

MAX_ANSWERS = 6  # of a question, each with a forward pass of its own


class Gap(NamedTuple):
    """Differences to the plain forward pass; of several texts the largest."""

    hidden: float  # largest difference of hidden states, relative to their size
    nats: float  # mean difference of a text's log-probabilities a token

    @property
    def is_rounding(self) -> bool:
        """Return whether float32 could differ by as much."""
        return self.hidden <= 1e-3 and self.nats <= 1e-3

    @property
    def is_half_rounding(self) -> bool:
        """Return whether half precision could: its kernels differ by up to 0.01; a real leak is 0.06 and more."""
        return self.hidden <= 0.03 and self.nats <= 0.05


NO_GAP = Gap(0.0, 0.0)
NO_NUMBERS = Gap(math.inf, math.inf)


def check_layout(
    model: PreTrainedModel, measure: Callable[[], Gap], *, layout: str
) -> tuple[Gap, str | None]:
    """Keep ``layout`` if it ``measure``s as the plain forward pass, else compute text by text from now on.

    Return the gap and, for the second, a warning. Raises InputError if the model differs even then.
    """
    kind = model.config.model_type
    reason = attention_masks.reason_for_one_text_per_row(model)
    if reason is None:
        gap, reason = _measure_or_reason(measure)
        gap = Gap(*map(max, zip(*distributed.all_gather(gap), strict=True)))  # all ranks decide alike
        if reason is None and _passes(model, gap):
            return gap, None
        reason = (
            reason
            or f"log-probabilities are off by {gap.nats:.3g} nats a token, hidden states by {gap.hidden:.3g}"
        )
    attention_masks.use_one_text_per_row(model)
    gap = measure()
    if not _passes(model, gap):
        raise InputError(
            f"{kind} models compute a text differently if others are in the batch (log-probabilities are off by "
            f"{gap.nats:.3g} nats a token, hidden states by {gap.hidden:.3g}): they are not supported."
        )
    return (
        gap,
        f"{layout} does not work with this {kind} model, so every text is computed alone, which is slower: {reason}.",
    )


def _passes(model: PreTrainedModel, gap: Gap) -> bool:
    return gap.is_rounding if model.dtype == torch.float32 else gap.is_half_rounding


def _measure_or_reason(measure: Callable[[], Gap]) -> tuple[Gap, str | None]:
    """Return the gap, or why there is none: many models have not been written for several texts in a row."""
    try:
        return measure(), None
    except (InputError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return NO_NUMBERS, f"it fails ({str(error).splitlines()[0]})"


@torch.no_grad()
def packing_gap(model: PreTrainedModel, *parts: Blocks) -> Gap:
    """Measure the block with the longest document and the one with most documents."""
    gap = NO_GAP
    for blocks, row in _hardest_blocks(parts):
        ids, positions = (x[row][None].to(model.device) for x in (blocks.input_ids, blocks.position_ids))
        packed = forward.hidden_states(model, ids, positions)[0]
        starts = [*torch.where(positions[0] == 0)[0].tolist(), ids.shape[1]]
        documents = [slice(a, b) for a, b in pairwise(starts)]
        alone = [forward.hidden_states(model, ids[:, document])[0] for document in documents]
        found = [packed[document] for document in documents]
        gap = _elementwise_max(gap, _gap(model, found, alone, [ids[0, document] for document in documents]))
    return gap


def _hardest_blocks(parts: tuple[Blocks, ...]) -> Iterator[tuple[Blocks, int]]:
    rows = [(blocks, row) for blocks in parts for row in range(len(blocks.labels))]
    longest = max(rows, key=lambda at: int(at[0].position_ids[at[1]].max()))
    fullest = max(
        rows, key=lambda at: int((at[0].position_ids[at[1]] == 0).sum())
    )  # a block of one could not leak
    yield longest
    if fullest[0] is not longest[0] or fullest[1] != longest[1]:
        yield fullest


@torch.no_grad()
def sharing_gap(model: PreTrainedModel, questions: list[Comparison], *, pad_id: int) -> Gap:
    """Measure the questions with the longest text, with the most tokens and with the most answers."""
    sizes: list[Callable[[Comparison], int]] = [
        lambda c: len(c.prompt) + max(map(len, c.answers)),
        lambda c: len(c.prompt) + sum(map(len, c.answers)),
        lambda c: len(c.answers),
    ]
    hardest = {question.question_id: question for question in (max(questions, key=size) for size in sizes)}
    asked = [(c.prompt, c.answers) for c in hardest.values()]
    width = model.config.get_text_config().hidden_size
    batch = shared_prompt.join(asked, pad_id=pad_id, device=model.device, hidden_size=width)
    shared = shared_prompt.all_hidden_states(model, batch)
    found: list[Tensor] = []
    alone: list[Tensor] = []
    texts: list[Tensor] = []
    number = 0
    for prompt, answers in asked:
        for i in evenly_spaced(len(answers), MAX_ANSWERS):
            ids = torch.tensor([prompt + answers[i]], device=model.device)
            alone.append(forward.hidden_states(model, ids)[0, len(prompt) - 1 :])
            places = torch.cat([batch.before[batch.owner == number + i], batch.ends[number + i][None]])
            found.append(shared[places])
            texts.append(ids[0, len(prompt) - 1 :])
        number += len(answers)
    return _gap(model, found, alone, texts)


def _gap(model: PreTrainedModel, found: list[Tensor], alone: list[Tensor], texts: list[Tensor]) -> Gap:
    """Compare hidden states (T, D) of texts, and the log-probabilities of each token but the first, (T,)."""
    size = torch.cat(alone).abs().max()
    if not size.isfinite():
        raise InputError(
            "Some hidden states of the model are no numbers, so nothing can be trained on them: set weights.* to float32."
        )
    hidden = torch.stack([(a - b).abs().max() for a, b in zip(found, alone, strict=True)]).max() / size
    nats = [0.0]
    for ours, plain, ids in zip(found, alone, texts, strict=True):
        if len(ids) > 1:
            head = forward.output_head(model)
            ours_log, plain_log = (chunked_log_probs.log_probs(x[:-1], head, ids[1:]) for x in (ours, plain))
            nats.append((ours_log - plain_log).abs().mean().item())
    if not all(map(math.isfinite, [hidden.item(), *nats])):  # `max` would lose a NaN
        return NO_NUMBERS
    return Gap(hidden.item(), max(nats))


def _elementwise_max(first: Gap, second: Gap) -> Gap:
    return Gap(max(first.hidden, second.hidden), max(first.nats, second.nats))
