"""Find out why sampler and scorer disagree, or why the KL from the reference is estimated below 0.

A KL is never negative. An estimate by samples (k1) is below 0 by more than chance only if the samples are not
the scorer's, or the reference is not what the policy started as: then PPO chases an artefact. The causes are
told apart by what each leaves unchanged: a pass is repeated, rows are scored without padding, the reference
is computed in another way, and the sampler's probabilities are held against whole distributions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.rlhf.algorithms import sampler_gap
from tasks.rlhf.algorithms.sampler_gap import Drawn
from tasks.rlhf.batches import sampling, sequences
from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.batches.sequences import Sequences
from tasks.rlhf.compute import fsdp
from tasks.rlhf.models import lora
from tasks.rlhf.training.rollouts import PpoModels, Rollout

ROWS = 8  # answers that are looked at
STANDARD_ERRORS = 4.0  # below 0 before a mean is no chance
LEAST_LOGP = -40.0  # of an end token that can be drawn: once in 10^17 tokens


class Settings(NamedTuple):
    """How answers are sampled, and by how much log-probabilities may differ."""

    temperature: float
    end_ids: tuple[int, ...]
    pad_id: int
    tolerance: float


def is_below_zero(rollout: Rollout, *, tolerance: float) -> bool:
    """Return whether the mean KL (k1) is below 0 by more than chance and rounding."""
    kl = (rollout.logp - rollout.ref_logp).sum(dim=1)  # (B,)
    error = kl.std().item() / len(kl) ** 0.5 if len(kl) > 1 else float("inf")
    return kl.mean().item() < -max(STANDARD_ERRORS * error, tolerance)


@torch.no_grad()
def find_cause(
    models: PpoModels, rollout: Rollout, settings: Settings, *, has_moved: Callable[[], bool] = lambda: False
) -> str:
    """Return the cause as a phrase, "" if none is found. ``has_moved``: whether a frozen weight changed."""
    if has_moved():
        return "the reference has moved: a frozen weight is not what it was at the start"
    rows = _choose_rows(rollout)
    causes = (
        _find_noise, _find_precision, _find_padding, _find_sampler_padding, _find_other_reference,
        _find_sampling, _find_missing_end,
    )  # fmt: skip
    return next(filter(None, (find(models, rollout, rows, settings) for find in causes)), "")


@torch.no_grad()
def find_start_cause(models: PpoModels, rollout: Rollout, settings: Settings) -> str:
    """Return what spoils log-probabilities even where sampler and scorer agree, as a phrase; "" if nothing.

    That is noise, padding, a reference that is not the policy's base, and an end token that cannot be drawn.
    """
    rows = _choose_rows(rollout)
    few = Rollout(*(_take_rows(value, rows) for value in rollout))
    every = torch.arange(len(rows), device=rows.device)
    causes = (_find_noise, _find_precision, _find_padding, _find_other_reference, _find_missing_end)
    return next(filter(None, (find(models, few, every, settings) for find in causes)), "")


def _take_rows(value: object, rows: Tensor) -> Any:
    return (
        value.rows(rows)
        if isinstance(value, Sequences)
        else value[rows]
        if isinstance(value, Tensor)
        else value
    )


def _choose_rows(rollout: Rollout) -> Tensor:
    """Return the shortest rows, which a batch pads most, the longest, and those that differ most."""
    ids, mask = rollout.batch
    columns = torch.arange(ids.shape[1], device=ids.device)
    order = torch.where(mask, columns, 0).amax(dim=1).argsort(stable=True)
    scored = rollout.logp if rollout.scorer_logp is None else rollout.scorer_logp
    gaps = torch.where(mask, (rollout.sampler_logp - scored).abs(), 0.0).amax(dim=1)
    rows: Tensor = torch.cat([order[: ROWS - 1], order[-1:], gaps.argsort(descending=True)[:ROWS]]).unique()
    return rows


def _log_probs(model: PreTrainedModel, batch: Sequences, settings: Settings) -> Tensor:
    return fsdp.with_full_weights(model, sequences.log_probs, batch, temperature=settings.temperature)


def _find_noise(models: PpoModels, rollout: Rollout, rows: Tensor, settings: Settings) -> str:
    """Return dropout as the cause, if two passes differ."""
    batch = rollout.batch.rows(rows)
    for adapter, role in (("policy", "policy"), (None, "reference")):
        with lora.active(models.model, adapter) as model:
            gap = _largest(_log_probs(model, batch, settings) - _log_probs(model, batch, settings))
        if gap > settings.tolerance / 10:
            return f"dropout is on: two passes of the {role} over the same answers differ by {gap:.2g} nats"
    return ""


def _find_padding(models: PpoModels, rollout: Rollout, rows: Tensor, settings: Settings) -> str:
    """Return padding as the cause, if a row alone is scored otherwise than in its batch."""
    for adapter, role in (("policy", "policy"), (None, "reference")):
        with lora.active(models.model, adapter) as model:
            together = _log_probs(model, rollout.batch, settings)[rows]
            alone = [_log_probs(model, rollout.batch.rows(row), settings) for row in rows.split(1)]
        gap = max(_largest(one[0] - row[: one.shape[1]]) for one, row in zip(alone, together, strict=True))
        if gap > settings.tolerance:
            return (
                f"padding is visible to the {role}, or shifts its positions: its log-probabilities of "
                f"an answer alone and in a batch differ by {gap:.2g} nats"
            )
    return ""


def _find_sampler_padding(models: PpoModels, rollout: Rollout, rows: Tensor, settings: Settings) -> str:
    """Return left padding as the cause, if it changes the sampler's first token or its log-probability."""
    ids, mask = rollout.batch
    starts = mask.long().argmax(dim=1).tolist()
    asked = [ids[row, : starts[row]].tolist() for row in rows.tolist()]
    numbers = torch.linspace(0.1, 0.9, len(asked), dtype=torch.float64)[:, None]
    with lora.active(models.model, "policy") as policy:

        def first(prompts: list[list[int]], uniform: Tensor) -> sampling.Samples:
            return fsdp.with_full_weights(
                policy, sampling.sample, prompts, max_tokens=1, temperature=settings.temperature,
                end_ids=settings.end_ids, pad_id=settings.pad_id, uniform=uniform,
            )  # fmt: skip

        together = first(asked, numbers)
        alone = [first([one], numbers[place : place + 1]) for place, one in enumerate(asked)]
    gaps = [
        _largest(one.logp[0] - together.logp[place]) if one.ids[0].equal(together.ids[place]) else 0.0
        for place, one in enumerate(alone)
    ]
    others = sum(not one.ids[0].equal(together.ids[place]) for place, one in enumerate(alone))
    if max(gaps) <= settings.tolerance and others < 2:  # one may be at the edge of two tokens
        return ""
    return (
        "the sampler sees left padding, or it shifts positions: the first token's log-probability of a "
        f"prompt alone and in a batch differs by {max(gaps):.2g} nats"
        + (f", and {others} of {len(asked)} tokens are others" if others else "")
    )


def _find_precision(models: PpoModels, _: Rollout, __: Tensor, ___: Settings) -> str:
    """Return another precision as the cause, if policy and reference compute in different ones."""
    with lora.active(models.model, None) as reference:
        theirs = _name(reference.dtype)
    with lora.active(models.model, "policy") as policy:
        ours = _name(policy.dtype)
    return (
        ""
        if theirs == ours
        else f"another precision: the reference computes in {theirs}, the policy in {ours}"
    )


def _find_other_reference(models: PpoModels, rollout: Rollout, rows: Tensor, settings: Settings) -> str:
    """Return another precision or model as the cause, if the reference is not the policy's own base."""
    batch = rollout.batch.rows(rows)
    with _bare_base(models) as base:
        expected = _log_probs(base, batch, settings)
    recorded = rollout.ref_logp[rows][:, : expected.shape[1]]
    gap = _largest(recorded - expected)
    if gap <= settings.tolerance:
        return ""
    rounded = _bfloat16_log_probs(models, batch, settings)
    if rounded is not None and _mean_gap(recorded, rounded) < _mean_gap(recorded, expected) / 2:
        return f"another precision: the reference's log-probabilities are of a bfloat16 pass, {gap:.2g} off"
    return f"the reference is not the policy's base: its log-probabilities are off by up to {gap:.2g} nats"


@contextmanager
def _bare_base(models: PpoModels) -> Iterator[PreTrainedModel]:
    """Yield the policy's base without an adapter, whatever the run takes as its reference."""
    base = models.model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    flags = [(parameter, parameter.requires_grad) for parameter in models.model.parameters()]
    with models.model.disable_adapter():
        yield base
    for parameter, flag in flags:  # peft's switch changes these as well
        parameter.requires_grad_(flag)


def _bfloat16_log_probs(models: PpoModels, batch: Sequences, settings: Settings) -> Tensor | None:
    """Return the base's log-probabilities in bfloat16; None if it computes in that already."""
    if models.model.dtype == torch.bfloat16:
        return None
    with _bare_base(models) as base, torch.autocast(base.device.type, torch.bfloat16):
        return _log_probs(base, batch, settings)


def _find_sampling(models: PpoModels, rollout: Rollout, rows: Tensor, settings: Settings) -> str:
    """Return the sampling setting that explains the sampler's probabilities of rows without padding."""
    parts: list[Drawn] = []
    with lora.active(models.model, "policy") as policy:
        for row in rows.split(1):
            one = rollout.batch.rows(row)
            mask = one.response_mask
            places = torch.where(mask[:, 1:])
            logits = fsdp.with_full_weights(policy, _logits, one.input_ids, places) / settings.temperature
            drawn_logp = rollout.sampler_logp[row][:, : mask.shape[1]][mask]
            numbers = torch.arange(len(drawn_logp), device=mask.device)
            parts.append(Drawn(torch.log_softmax(logits, dim=1), one.input_ids[mask], drawn_logp, numbers))
    drawn = Drawn(*(torch.cat(values) for values in zip(*parts, strict=True)))
    gap = _largest(drawn.gap)
    if found := sampler_gap.explain_gap(drawn, settings.end_ids, tolerance=settings.tolerance):
        return f"{found}: its log-probabilities are up to {gap:.2g} nats from the scorer's"
    if gap > settings.tolerance:
        return f"the sampler draws from another distribution, up to {gap:.2g} nats from the scorer's"
    return ""


def _find_missing_end(models: PpoModels, rollout: Rollout, rows: Tensor, settings: Settings) -> str:
    """Return as the cause that no answer can end, if end tokens have no probability at the last places."""
    if rollout.ended[rows].any():
        return ""
    batch = rollout.batch.rows(rows)
    columns = torch.arange(batch.input_ids.shape[1], device=rows.device)
    last = torch.where(batch.response_mask, columns, 0).amax(dim=1)
    with lora.active(models.model, "policy") as policy:
        places = torch.arange(len(rows), device=rows.device), last - 1
        logits = fsdp.with_full_weights(policy, _logits, batch.input_ids, places) / settings.temperature
    likeliest = torch.log_softmax(logits, dim=1)[:, list(settings.end_ids)].max().item()
    if likeliest >= LEAST_LOGP:
        return ""
    return f"the end token cannot be drawn: its log-probability at the last position is {likeliest:.0f}"


def _logits(model: PreTrainedModel, ids: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    """Return the logits (N, V) float32 after the tokens at ``places``: rows and columns of ids (B, T)."""
    return output_head(model)(hidden_states(model, ids)[places]).float()  # type: ignore[no-any-return]


def _largest(gap: Tensor) -> float:
    found = gap.abs().max().item() if gap.numel() else 0.0
    return found if found == found else float("inf")  # NaN


def _mean_gap(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
