"""Measure how often pairs are ordered as voters do: overall, by score gap, by length, and by simple rules.

A model or a rule gets one credit per pair: 1 for the voters' order, 0 for the other one. A model's tie is 0;
a rule that cannot decide guesses, which is 0.5. Pairs of one question share answers and so are not
independent: Wilson's interval is too narrow for them, so a second one is bootstrapped over whole questions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.evaluation.intervals import Interval, wilson

DRAWS = 2000  # of the bootstrap: the ends of its interval are then precise to about a twentieth of its width
MOST_DRAWN = 2**15  # questions in memory at a time, which fit into a processor's cache
RANK_DRAWS = 500  # of the bootstrap of a rank correlation, each of which sorts all answers


class Stratum(NamedTuple):
    """The accuracy over some pairs, with two 95 % intervals."""

    wilson: Interval  # as if all pairs were independent
    clustered: (
        Interval  # bootstrapped over questions; too narrow, a point, if all pairs are right or all wrong
    )
    questions: int


def credit(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the credits of ordering pairs by a number, with ties one half. (P,), (P,) -> (P,) float64.

    The number is a reward, or a length for the rule "the longer wins".
    """
    assert chosen.shape == rejected.shape
    signs = (chosen - rejected).sign().double()
    return (signs + 1) / 2


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the credits of ordering pairs by a model's rewards, with ties 0. (P,), (P,) -> (P,) float64."""
    assert chosen.shape == rejected.shape
    return (chosen > rejected).double()


def measure(credits: Tensor, question: Tensor, *, seed: int = 0) -> Stratum:
    """Return the accuracy over pairs. credits (P,), question (P,) ids."""
    interval = wilson(credits.sum().item(), len(credits))
    return Stratum(
        interval, clustered_mean(credits, question, seed=seed, bounds=(0.0, 1.0)), len(question.unique())
    )


def by_gap(credits: Tensor, gap: Tensor, question: Tensor, *, seed: int = 0) -> dict[str, Stratum]:
    """Return the accuracy for score gaps of 1, 2 and more, fractions rounded up, without empty strata.

    All (P,).
    """
    step = gap.ceil().clamp(1, 3)
    return _by_part(credits, question, {"gap_1": step == 1, "gap_2": step == 2, "gap_3_up": step == 3}, seed)


def by_length(
    credits: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, question: Tensor, *, seed: int = 0
) -> dict[str, Stratum]:
    """Return the accuracy where the chosen answer is longer, shorter, or of matching length. All (P,).

    Lengths match if they differ by at most a tenth of the longer. They are in tokens as the model reads them:
    two answers that were cut match.
    """
    matched = 10 * (chosen_tokens - rejected_tokens).abs() <= torch.maximum(chosen_tokens, rejected_tokens)
    longer = chosen_tokens > rejected_tokens
    parts = {
        "longer_chosen": longer & ~matched,
        "shorter_chosen": ~longer & ~matched,
        "length_matched": matched,
    }
    return _by_part(credits, question, parts, seed)


def _by_part(credits: Tensor, question: Tensor, parts: dict[str, Tensor], seed: int) -> dict[str, Stratum]:
    return {
        name: measure(credits[part], question[part], seed=seed) for name, part in parts.items() if part.any()
    }


def accuracy_difference(ours: Tensor, theirs: Tensor, question: Tensor, *, seed: int = 0) -> Interval:
    """Return the accuracy of ``ours`` minus that of ``theirs`` on the same pairs, -1 to 1.

    credits (P,), (P,).

    ``ours`` is better if ``low`` is above 0; the interval is bootstrapped over questions.
    """
    return clustered_mean(ours - theirs, question, seed=seed, bounds=(-1.0, 1.0))


def clustered_mean(
    values: Tensor, question: Tensor, *, bounds: tuple[float, float], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Return the mean over pairs with its 95 % percentile bootstrap interval over whole questions.

    (P,), (P,).

    Davison and Hinkley 1997, section 3.8. A resampled question brings all its pairs, so the number of pairs
    varies with the draw. ``n`` is the number of pairs. A single question has no variance between questions:
    the interval is then ``bounds``, the least and the greatest possible mean.
    """
    assert values.shape == question.shape
    assert len(values) > 0
    _, cluster, pairs = question.cpu().unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(pairs), dtype=torch.float64).index_add(0, cluster, values.cpu().double())
    mean = (sums.sum() / len(values)).item()
    if len(pairs) < 2:
        return Interval(mean, *bounds, len(values))
    generator = torch.Generator().manual_seed(seed)
    size = max(1, MOST_DRAWN // len(pairs))
    means = []
    for first in range(0, draws, size):
        drawn = torch.randint(len(pairs), (min(size, draws - first), len(pairs)), generator=generator)
        means.append(sums[drawn].sum(dim=1) / pairs[drawn].sum(dim=1))  # (B,)
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high, len(values))


def wider_interval(stratum: Stratum) -> Interval:
    """Return the wider of a stratum's two intervals at either end."""
    value, low, high, n = stratum.clustered
    return Interval(value, min(low, stratum.wilson.low), max(high, stratum.wilson.high), n)


def centre_by_question(values: Tensor, question: Tensor) -> Tensor:
    """Return values minus their question's mean, (S,): pairs do not determine rewards across questions."""
    _, cluster, counts = question.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(counts), dtype=torch.float64, device=values.device)
    sums = zeros.index_add(0, cluster, values.double())
    centre: Tensor = (sums / counts)[cluster]
    return values.double() - centre


def spearman(
    first: Tensor, second: Tensor, *, question: Tensor | None = None, seed: int = 0, draws: int = RANK_DRAWS
) -> Interval:
    """Return Spearman's rank correlation of two columns with its 95 % interval. (S,), (S,), (S,).

    Equal values share their mean rank; NaN with the interval [-1, 1] if a column is constant. The interval is
    Fisher's z with the variance (1 + rho^2 / 2) / (S - 3) (Bonett and Wright 2000), as if answers were
    independent. Answers to one ``question`` are not: with it the interval is the wider, at either end, of
    that and a bootstrap over whole questions.
    """
    assert first.shape == second.shape
    n, rho = len(first), _correlation(first, second)
    if n <= 3 or math.isnan(rho):
        return Interval(rho, -1.0, 1.0, n)
    if abs(rho) > 1 - 1e-12:  # z is infinite
        return Interval(rho, rho, rho, n)
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
    if question is not None:
        bootstrap = _bootstrap_correlations(first, second, question, seed=seed, draws=draws)
        low, high = min(low, bootstrap[0]), max(high, bootstrap[1])
    return Interval(rho, low, high, n)


def _bootstrap_correlations(
    first: Tensor, second: Tensor, question: Tensor, *, seed: int, draws: int
) -> tuple[float, float]:
    """Return the middle 95 % of the rank correlations of resampled questions, each with all its answers."""
    _, cluster, counts = question.cpu().unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return -1.0, 1.0
    generator = torch.Generator().manual_seed(seed)
    size = max(1, MOST_DRAWN // len(first))
    found = []
    for start in range(0, draws, size):
        drawn = torch.randint(len(counts), (min(size, draws - start), len(counts)), generator=generator)
        times = torch.zeros(drawn.shape, dtype=torch.float64)
        times.scatter_add_(1, drawn, torch.ones_like(times))  # (B, Q)
        found.append(_correlations(first, second, times[:, cluster]))
    values = torch.cat(found)
    values = values[~values.isnan()]
    if not len(values):
        return -1.0, 1.0
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _correlations(first: Tensor, second: Tensor, times: Tensor) -> Tensor:
    """Return the rank correlations of samples that hold answers so many ``times``. (S,), (S,), (B, S): (B,).

    NaN if a column of a sample is constant.
    """
    size = times.sum(dim=1, keepdim=True)
    a, b = (_ranks(column, times) for column in (first, second))
    a, b = (ranks - (times * ranks).sum(dim=1, keepdim=True) / size for ranks in (a, b))
    norms = (times * a * a).sum(dim=1).sqrt() * (times * b * b).sum(dim=1).sqrt()
    return ((times * a * b).sum(dim=1) / norms).clamp(-1, 1)


def _correlation(first: Tensor, second: Tensor) -> float:
    """Return Pearson's correlation of the ranks."""
    return _correlations(first, second, torch.ones(1, len(first), dtype=torch.float64)).item()


def _ranks(values: Tensor, times: Tensor) -> Tensor:
    """Return ranks from 1 in samples that hold each value so many ``times``. (S,), (B, S): (B, S) float64.

    Equal values share the mean of their ranks.
    """
    distinct, index = values.cpu().unique(return_inverse=True)
    counts = torch.zeros(len(times), len(distinct), dtype=torch.float64).index_add_(1, index, times)
    ranks: Tensor = counts.cumsum(dim=1) - (counts - 1) / 2
    return ranks[:, index]
