"""Find out which sampling setting explains that a sampler's log-probabilities are not the scorer's.

A sampler that leaves tokens out renormalises the others: its log-probability of the token that it drew is the
scorer's minus the log of the probability that is left. Each setting leaves out others.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = torch.logspace(-1, 1, 401, dtype=torch.float64)  # factors that are tried


class Drawn(NamedTuple):
    """Tokens that a sampler drew, with both sides' idea of their probability."""

    log_probs: Tensor  # (N, V) of the scorer, over the whole vocabulary
    tokens: Tensor  # (N,)
    sampler_logp: Tensor  # (N,)
    places: Tensor  # (N,) in their answers, from 0

    @property
    def gap(self) -> Tensor:
        """Return by how much the sampler's log-probability is above the scorer's, (N,)."""
        return self.sampler_logp - self.log_probs.gather(1, self.tokens[:, None])[:, 0]


def explain_gap(drawn: Drawn, end_ids: Sequence[int], *, tolerance: float) -> str:
    """Return the sampling setting that explains the gap to ``tolerance``, as a phrase; "" if none does."""
    drawn = Drawn(drawn.log_probs.double(), drawn.tokens, drawn.sampler_logp.double(), drawn.places)
    if not len(drawn.tokens) or drawn.gap.abs().max() <= tolerance:
        return ""
    explanations = (
        _explain_by_end(drawn, end_ids, tolerance),
        _explain_by_top_k(drawn, tolerance),
        _explain_by_temperature(drawn, tolerance),
        _explain_by_top_p(drawn, tolerance),
    )
    return next(filter(None, explanations), "")


def _explain_by_end(drawn: Drawn, end_ids: Sequence[int], tolerance: float) -> str:
    """A minimum length: up to there, end tokens cannot be drawn."""
    ends = drawn.log_probs[:, list(end_ids)].exp().sum(dim=1)
    expected = -torch.log1p(-ends.clamp(max=1 - 1e-12))
    raised = drawn.gap > tolerance
    if not raised.any():
        return ""
    length = int(drawn.places[raised].max()) + 1
    early = drawn.places < length
    fits = (drawn.gap - torch.where(early, expected, 0.0)).abs().max() <= tolerance
    if not fits or torch.isin(drawn.tokens[early], torch.tensor(end_ids, device=drawn.tokens.device)).any():
        return ""
    return f"the sampler allows no end token among the first {length} tokens (a minimum length)"


def _explain_by_top_k(drawn: Drawn, tolerance: float) -> str:
    """The same number of tokens is kept everywhere."""
    mass = drawn.log_probs.sort(dim=1, descending=True).values.exp().cumsum(dim=1)
    misfit = (drawn.gap[:, None] + mass.log()).abs().amax(dim=0)  # (V,)
    kept = int(misfit.argmin()) + 1
    if misfit[kept - 1] > tolerance or kept == mass.shape[1]:
        return ""
    return f"the sampler draws from the {kept} most likely tokens alone (top-k)"


def _explain_by_temperature(drawn: Drawn, tolerance: float) -> str:
    factor, step = _best_factor(drawn, TEMPERATURES), float(TEMPERATURES[1] / TEMPERATURES[0])
    factor = _best_factor(drawn, factor * torch.linspace(1 / step, step, 201, dtype=torch.float64))
    is_one = abs(factor - 1) < tolerance
    if is_one or _misfit(drawn, factor) > 2 * tolerance:
        return ""
    return f"the sampler's temperature is {factor:.2f} times the scorer's"


def _best_factor(drawn: Drawn, factors: Tensor) -> float:
    misfits = [_misfit(drawn, factor) for factor in factors.tolist()]
    return float(factors[misfits.index(min(misfits))])


def _misfit(drawn: Drawn, factor: float) -> float:
    """Return the largest gap if the scorer's temperature were ``factor`` times what it is."""
    scaled = torch.log_softmax(drawn.log_probs / factor, dim=1).gather(1, drawn.tokens[:, None])[:, 0]
    return float((drawn.sampler_logp - scaled).abs().max())


def _explain_by_top_p(drawn: Drawn, tolerance: float) -> str:
    """The likeliest tokens are kept whose probability reaches p: at each place another number of them."""
    if (drawn.gap < -tolerance).any():
        return ""
    mass = drawn.log_probs.sort(dim=1, descending=True).values.exp().cumsum(dim=1)
    left = torch.exp(-drawn.gap)
    misfit = (left[:, None].log() - mass.log()).abs()
    count = misfit.argmin(dim=1, keepdim=True)
    if misfit.gather(1, count).max() > tolerance:
        return ""
    reached = mass.gather(1, count)[:, 0]
    before = torch.where(count[:, 0] > 0, mass.gather(1, (count - 1).clamp(min=0))[:, 0], 0.0)
    low, high = float(before.max()), float(reached.min())
    least = float(left.min())
    if low <= high + tolerance:
        return f"the sampler draws from the likeliest tokens that reach {high:.2f} alone (top-p)"
    return f"the sampler leaves out tokens of up to {1 - least:.0%} probability (top-p, min-p or top-k)"
