"""Sampling answers from the model's own distribution: temperature only, so that sampler and scorer are the same."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tasks.rlhf.compute.seeds import mix

VOCABULARY_CHUNK = 1024  # tokens of a vocabulary that are summed at a time


class Samples(NamedTuple):
    """Sampled answers, padded on the right."""

    ids: Tensor  # (B, R) int64; pad after the end token
    mask: Tensor  # (B, R) bool; True on answer tokens, the end token included
    logp: Tensor  # (B, R) float32 log-probabilities under the sampling distribution, 0 outside the mask


def pad_left(prompts: list[list[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt ids and mask, (B, P) each, padded on the left."""
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
    """One answer per prompt, at most ``max_tokens`` long; it ends with one of ``end_ids`` unless it was cut. ``generator`` is on the model's device.

    ``uniform`` (B, max_tokens) are numbers from [0, 1) to draw tokens by, so that a row's do not depend on its batch. Without them the numbers of a
    step are drawn for every row, finished or not, so a row's answer does not depend on when others end.
    """
    device = model.device
    ids, mask = pad_left(prompts, pad_id, device)
    rows = len(prompts)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache()
    tokens, logps, alive_steps = [], [], []
    alive = torch.ones(rows, dtype=torch.bool, device=device)
    ends = torch.tensor([*end_ids], dtype=torch.long, device=device)
    fine = torch.Generator(device).manual_seed(mix(_initial_seed(generator, device), 1))
    for step in range(max_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logp = torch.log_softmax(output.logits[:, -1].float() / temperature, dim=-1)
        chosen = _uniform(rows, generator, fine) if uniform is None else uniform[:, step].to(device)
        drawn = _inverse_cdf(logp, chosen)
        token = torch.where(alive, drawn, pad_id)
        tokens.append(token)
        logps.append(torch.where(alive, logp.gather(1, drawn[:, None])[:, 0], 0.0))
        alive_steps.append(alive)
        alive = alive & ~torch.isin(drawn, ends)
        if not alive.any():
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return Samples(torch.stack(tokens, dim=1), torch.stack(alive_steps, dim=1), torch.stack(logps, dim=1))


def _inverse_cdf(logp: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw from each row of log-probabilities (B, V) with its uniform number (B,) float64.

    In float32 the sum has steps of 6e-8 near 1, and so have the numbers of `torch.rand`: with normal logits of deviation 3
    and a vocabulary of 152,000, a third of the tokens could never be drawn. Large vocabularies are summed in parts that stay
    in the cache, and only the part that is drawn from is summed token by token.
    """
    parts = logp.split(VOCABULARY_CHUNK, dim=-1)
    if len(parts) == 1:
        cdf = logp.double().exp().cumsum(dim=-1)
        return _first_above(cdf, uniform * cdf[:, -1])
    sums = torch.stack([part.double().exp().sum(dim=-1) for part in parts], dim=1)  # (B, parts)
    cdf = sums.cumsum(dim=-1)
    point = uniform * cdf[:, -1]
    part = _first_above(cdf, point)[:, None]
    before = (cdf.gather(1, part) - sums.gather(1, part))[:, 0]
    tokens = part * VOCABULARY_CHUNK + torch.arange(
        VOCABULARY_CHUNK, device=logp.device
    )  # (B, PART), of the last part some beyond the vocabulary
    is_token = tokens < logp.shape[1]
    inside = (
        torch.where(is_token, logp.gather(1, tokens.where(is_token, 0)), -torch.inf)
        .double()
        .exp()
        .cumsum(dim=-1)
    )
    place = _first_above(
        inside, torch.minimum(point - before, inside[:, -1] * (1 - 2**-50))
    )  # sums of another order round otherwise
    return tokens.gather(1, place[:, None])[:, 0].clamp(max=logp.shape[1] - 1)  # of NaN


def _first_above(cdf: Tensor, point: Tensor) -> Tensor:
    """Return the first place of each row of ``cdf`` (B, N) that is above the row's ``point`` (B,)."""
    return torch.searchsorted(cdf, point[:, None], right=True).clamp(max=cdf.shape[1] - 1)[:, 0]


def _uniform(rows: int, generator: torch.Generator | None, fine: torch.Generator) -> Tensor:
    """Numbers from [0, 1) in steps of 2^-48, (rows,) float64: float32's 24 bits, and 24 more from the ``fine`` generator."""
    high = torch.rand(rows, generator=generator, device=fine.device)
    low = torch.rand(rows, generator=fine, device=fine.device)
    return high.double() + low.double() * 2**-24


def _initial_seed(generator: torch.Generator | None, device: torch.device) -> int:
    """What a generator, or else the device's own, was seeded with."""
    if generator is not None:
        return generator.initial_seed()
    return torch.cuda.initial_seed() if device.type == "cuda" else torch.initial_seed()
