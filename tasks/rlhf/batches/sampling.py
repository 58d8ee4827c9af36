"""Sample answers at a temperature, without top-k or top-p: sampling and scoring log_probs agree."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tasks.rlhf.batches import key_value_cache
from tasks.rlhf.batches.forward import output_head
from tasks.rlhf.compute.seeds import mix

VOCABULARY_CHUNK = 1024  # tokens of a vocabulary whose probabilities are summed at a time
KEPT_SHARE = 0.75  # of a batch's rows: if fewer are unfinished, the finished ones leave it


class Samples(NamedTuple):
    """Sampled answers, padded on the right."""

    ids: Tensor  # (B, R) int64; pad after the end token
    mask: Tensor  # (B, R) bool; True on answer tokens, the end token included
    logp: Tensor  # (B, R) float32 log-probabilities under the sampling distribution, 0 outside the mask


def pad_left(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return prompt ids and attention mask (True on prompt tokens), (B, P) each, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    temperature: float,
    end_ids: Sequence[int],
    pad_id: int,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
) -> Samples:
    """Sample one answer per prompt, of at most ``max_tokens``, which ends with one of ``end_ids`` or is cut.

    ``generator`` is on the model's device. ``uniform`` (B, max_tokens) are numbers from [0, 1) by which
    tokens are drawn, so that a row's tokens do not depend on its batch. Without them a number is drawn for
    every row at every step, finished or not, so a row's answer does not depend on when others end.
    """
    device = model.device
    ids, mask = pad_left(prompts, pad_id, device)
    num_rows = len(prompts)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    cache = key_value_cache.new_cache()
    tokens = torch.full((num_rows, max_tokens), pad_id, device=device)
    logps = torch.zeros(num_rows, max_tokens, device=device)
    answer_mask = torch.zeros(num_rows, max_tokens, dtype=torch.bool, device=device)
    rows = torch.arange(num_rows, device=device)  # those that are still in the batch
    unfinished = torch.ones(num_rows, dtype=torch.bool, device=device)  # (len(rows),)
    ends = torch.tensor([*end_ids], dtype=torch.long, device=device)
    low_bits = torch.Generator(device).manual_seed(mix(_initial_seed(generator, device), 1))
    for step in range(max_tokens):
        logits = _next_logits(model, ids, mask, positions, cache)
        logp = torch.log_softmax(logits.float() / temperature, dim=-1)
        numbers = _uniform(num_rows, generator, low_bits) if uniform is None else uniform[:, step].to(device)
        sampled = _inverse_cdf(logp, numbers[rows])
        token = torch.where(unfinished, sampled, pad_id)
        tokens[rows, step] = token
        logps[rows, step] = torch.where(unfinished, logp.gather(1, sampled[:, None])[:, 0], 0.0)
        answer_mask[rows, step] = unfinished
        unfinished = unfinished & ~torch.isin(sampled, ends)
        num_unfinished = int(unfinished.sum())
        if not num_unfinished:
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        if num_unfinished <= KEPT_SHARE * len(rows) and key_value_cache.holds_all_rows(cache, *mask.shape):
            kept = torch.where(unfinished)[0]
            key_value_cache.select_rows(cache, kept)
            rows, ids, positions, mask = rows[kept], ids[kept], positions[kept], mask[kept]
            unfinished = unfinished[kept]
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    num_tokens = step + 1
    return Samples(tokens[:, :num_tokens], answer_mask[:, :num_tokens], logps[:, :num_tokens])


def _next_logits(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache
) -> Tensor:
    """Return the logits of the token after each row's last, (B, V)."""
    # The last hidden states are a view of all, of which a product in bfloat16 copies the head for every row.
    made_whole = output_head(model).register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    with made_whole:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    logits: Tensor = output.logits[:, -1]
    return logits


def uniform_numbers(seed: int, name: str, question_ids: list[int], num_tokens: int) -> Tensor:
    """Return the numbers that the policy ``name`` draws its answers by, (Q, num_tokens) float64 in [0, 1).

    They depend on its name and the question alone: not on the other policies, the other questions or the
    device.
    """
    name_seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
    rows = []
    for question_id in question_ids:
        generator = torch.Generator().manual_seed(mix(seed, name_seed, question_id))
        rows.append(torch.rand(num_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def _inverse_cdf(logp: Tensor, uniform: Tensor) -> Tensor:
    """Return the token at each row's uniform number (B,) float64 of the cumulative distribution, logp (B, V).

    In float32 the sum has steps of 6e-8 near 1, and so have the numbers of `torch.rand`: with normal logits
    of standard deviation 3 and a vocabulary of 152,000, a third of the tokens could never be drawn. Large
    vocabularies are summed in chunks that fit the cache, and only the chunk of the sampled token is summed
    token by token.
    """
    chunks = logp.split(VOCABULARY_CHUNK, dim=-1)
    if len(chunks) == 1:
        cdf = logp.double().exp().cumsum(dim=-1)
        return _first_above(cdf, uniform * cdf[:, -1])
    sums = torch.stack([chunk.double().exp().sum(dim=-1) for chunk in chunks], dim=1)  # (B, chunks)
    cdf = sums.cumsum(dim=-1)
    point = uniform * cdf[:, -1]
    chunk = _first_above(cdf, point)[:, None]
    before = (cdf.gather(1, chunk) - sums.gather(1, chunk))[:, 0]
    # (B, VOCABULARY_CHUNK); the last chunk may reach beyond the vocabulary
    tokens = chunk * VOCABULARY_CHUNK + torch.arange(VOCABULARY_CHUNK, device=logp.device)
    is_token = tokens < logp.shape[1]
    chunk_logp = torch.where(is_token, logp.gather(1, tokens.where(is_token, 0)), -torch.inf)
    chunk_cdf = chunk_logp.double().exp().cumsum(dim=-1)
    # The chunk's last sum may be a little below its difference in ``cdf``: the order of the additions
    # differs.
    offset = _first_above(chunk_cdf, torch.minimum(point - before, chunk_cdf[:, -1] * (1 - 2**-50)))
    return tokens.gather(1, offset[:, None])[:, 0].clamp(max=logp.shape[1] - 1)  # if logp is NaN


def _first_above(cdf: Tensor, point: Tensor) -> Tensor:
    """Return the first index of each row of ``cdf`` (B, N) whose value is above the row's ``point`` (B,)."""
    return torch.searchsorted(cdf, point[:, None], right=True).clamp(max=cdf.shape[1] - 1)[:, 0]


def _uniform(rows: int, generator: torch.Generator | None, low_bits: torch.Generator) -> Tensor:
    """Draw numbers from [0, 1) in steps of 2^-48, (rows,) float64: 24 bits, and 24 more from ``low_bits``."""
    high = torch.rand(rows, generator=generator, device=low_bits.device)
    low = torch.rand(rows, generator=low_bits, device=low_bits.device)
    return high.double() + low.double() * 2**-24


def _initial_seed(generator: torch.Generator | None, device: torch.device) -> int:
    """Return the seed of a generator, or of the device's own if that is None."""
    if generator is not None:
        return generator.initial_seed()
    return torch.cuda.initial_seed() if device.type == "cuda" else torch.initial_seed()
