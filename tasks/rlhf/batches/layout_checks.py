"""Check that several texts in one row (packed, or sharing a prompt) are computed as each one alone is.

It runs before training, on the texts for which a wrong mask shows most: the longest, and rows of many texts.
A model that fails is computed with one text per row; one that fails even then is refused.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.batches import attention_masks, chunked_log_probs, forward, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison, evenly_spaced
from tasks.rlhf.batches.packing import Blocks
from tasks.rlhf.compute import distributed, fsdp
from tasks.system.errors import InputError

MAX_ANSWERS = 6  # of a question, each with a forward pass of its own


class Gap(NamedTuple):
    """Largest differences to the plain forward pass over several texts."""

    hidden: float  # largest difference of hidden states, relative to the largest hidden state
    nats: float  # mean difference of a text's log-probabilities per token

    @property
    def is_rounding(self) -> bool:
        """Return whether the gap may be float32 rounding."""
        return self.hidden <= 1e-3 and self.nats <= 1e-3

    @property
    def is_half_precision_rounding(self) -> bool:
        """Return whether the gap may be half-precision rounding (to 0.01); a leaking mask gives over 0.06."""
        return self.hidden <= 0.03 and self.nats <= 0.05


NO_GAP = Gap(0.0, 0.0)
NO_NUMBERS = Gap(math.inf, math.inf)


def check_layout(
    model: PreTrainedModel, measure: Callable[[], Gap], *, layout: str
) -> tuple[Gap, str | None]:
    """Keep ``layout`` if the gap that ``measure`` returns is rounding, else use one text per row from now on.

    Return the gap and, in the second case, a warning. Raises InputError if the model differs even then.
    """
    kind = model.config.model_type
    reason = attention_masks.reason_for_one_text_per_row(model)
    if reason is None:
        gap, reason = _measure_or_reason(measure)
        gap = Gap(*map(max, zip(*distributed.all_gather(gap), strict=True)))  # so all ranks decide the same
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
            f"{kind} models compute a text differently if others are in the batch (log-probabilities are off "
            f"by {gap.nats:.3g} nats a token, hidden states by {gap.hidden:.3g}): they are not supported."
        )
    return (
        gap,
        f"{layout} does not work with this {kind} model, so every text is computed alone, which is slower: "
        f"{reason}.",
    )


def _passes(model: PreTrainedModel, gap: Gap) -> bool:
    return gap.is_rounding if fsdp.compute_dtype(model) == torch.float32 else gap.is_half_precision_rounding


def _measure_or_reason(measure: Callable[[], Gap]) -> tuple[Gap, str | None]:
    """Return the gap, or why it cannot be measured: many models do not expect several texts in a row."""
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
        together = [packed[document] for document in documents]
        texts = [ids[0, document] for document in documents]
        gap = _elementwise_max(gap, _gap(model, together, alone, texts))
    return gap


def _hardest_blocks(parts: tuple[Blocks, ...]) -> Iterator[tuple[Blocks, int]]:
    """Yield the row with the longest document and that with most documents, if it is another one."""
    rows = [(blocks, row) for blocks in parts for row in range(len(blocks.labels))]
    longest = max(rows, key=lambda at: int(at[0].position_ids[at[1]].max()))
    fullest = max(rows, key=lambda at: int((at[0].position_ids[at[1]] == 0).sum()))
    yield longest
    if fullest[0] is not longest[0] or fullest[1] != longest[1]:
        yield fullest


def hardest_questions(questions: Iterable[Comparison]) -> list[Comparison]:
    """Return the questions with the longest text, with the most tokens and with the most answers."""
    largest: dict[int, tuple[int, Comparison]] = {}
    for question in questions:
        lengths = [*map(len, question.answers)]
        sizes = (len(question.prompt) + max(lengths), len(question.prompt) + sum(lengths), len(lengths))
        for number, size in enumerate(sizes):
            if number not in largest or size > largest[number][0]:
                largest[number] = (size, question)
    return list({question.question_id: question for _, question in largest.values()}.values())


@torch.no_grad()
def sharing_gap(model: PreTrainedModel, questions: Iterable[Comparison], *, pad_id: int) -> Gap:
    """Measure the hardest questions."""
    inputs = [(c.prompt, c.answers) for c in hardest_questions(questions)]
    width = model.config.get_text_config().hidden_size
    batch = shared_prompt.join(inputs, pad_id=pad_id, device=model.device, hidden_size=width)
    shared = shared_prompt.all_hidden_states(model, batch)
    together: list[Tensor] = []
    alone: list[Tensor] = []
    texts: list[Tensor] = []
    first = 0  # index of the question's first answer
    for prompt, answers in inputs:
        for i in evenly_spaced(len(answers), MAX_ANSWERS):
            ids = torch.tensor([prompt + answers[i]], device=model.device)
            alone.append(forward.hidden_states(model, ids)[0, len(prompt) - 1 :])
            indices = torch.cat([batch.before[batch.owner == first + i], batch.ends[first + i][None]])
            together.append(shared[indices])
            texts.append(ids[0, len(prompt) - 1 :])
        first += len(answers)
    return _gap(model, together, alone, texts)


def _gap(model: PreTrainedModel, together: list[Tensor], alone: list[Tensor], texts: list[Tensor]) -> Gap:
    """Compare hidden states (T, D) of texts, and the log_probs of each token except the first, (T,)."""
    size = torch.cat(alone).abs().max()
    if not size.isfinite():
        raise InputError(
            "Some hidden states of the model are NaN or infinite, so nothing can be trained on them: set "
            "weights.* to float32."
        )
    hidden = torch.stack([(a - b).abs().max() for a, b in zip(together, alone, strict=True)]).max() / size
    nats = [0.0]
    for in_row, plain, ids in zip(together, alone, texts, strict=True):
        if len(ids) > 1:
            head = forward.output_head(model)
            logp = chunked_log_probs.log_probs(in_row[:-1], head, ids[1:])
            plain_logp = chunked_log_probs.log_probs(plain[:-1], head, ids[1:])
            nats.append((logp - plain_logp).abs().mean().item())
    if not all(map(math.isfinite, [hidden.item(), *nats])):  # `max` would lose a NaN
        return NO_NUMBERS
    return Gap(hidden.item(), max(nats))


def _elementwise_max(first: Gap, second: Gap) -> Gap:
    return Gap(max(first.hidden, second.hidden), max(first.nats, second.nats))
