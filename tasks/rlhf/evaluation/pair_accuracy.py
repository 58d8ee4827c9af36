"""How often pairs are ordered as the voters order them: over all, by score gap, by length, and against rules of thumb.

Whatever orders pairs gives credits, one a pair: 1 the voters' order, 0 the other one. A model's tie is no success; a rule of thumb that cannot
tell guesses, which is worth a half. Pairs of one question share answers and so are not independent: Wilson's interval is too narrow for them, and
a second one is drawn over whole questions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tasks.rlhf.evaluation.intervals import Interval, wilson

DRAWS = 2000  # of the bootstrap; the ends of its interval are then good to about a twentieth of its width
RANK_DRAWS = 500  # of a rank correlation's, each of which sorts all answers


class Stratum(NamedTuple):
    """The accuracy over some pairs, with two 95 % intervals."""

    wilson: Interval  # as if all pairs were independent
    clustered: Interval  # questions redrawn; a point where all is right or all is wrong, which only Wilson's interval is honest about
    questions: int


def credit(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Credit of ordering pairs by a number, the higher wins: rewards, or token lengths for the rule "the longer wins". (P,), (P,) -> (P,) float64."""
    assert chosen.shape == rejected.shape
    signs = (chosen - rejected).sign().double()
    return (signs + 1) / 2


def correct(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Success of ordering pairs by a model's rewards: 1 only if the chosen answer's is higher, so a tie is none. (P,), (P,) -> (P,) float64."""
    assert chosen.shape == rejected.shape
    return (chosen > rejected).double()


def measure(credits: Tensor, question: Tensor, *, seed: int = 0) -> Stratum:
    """Accuracy over all the given pairs. credits (P,), question (P,) ids."""
    interval = wilson(credits.sum().item(), len(credits))
    return Stratum(
        interval, clustered_mean(credits, question, seed=seed, bounds=(0.0, 1.0)), len(question.unique())
    )


def by_gap(credits: Tensor, gap: Tensor, question: Tensor, *, seed: int = 0) -> dict[str, Stratum]:
    """Accuracy where the chosen answer's score is higher by 1, by 2, by more; fractions count up. Empty strata are left out. All (P,)."""
    step = gap.ceil().clamp(1, 3)
    return _by_part(credits, question, {"gap_1": step == 1, "gap_2": step == 2, "gap_3_up": step == 3}, seed)


def by_length(
    credits: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, question: Tensor, *, seed: int = 0
) -> dict[str, Stratum]:
    """Accuracy where the chosen answer is the longer, where it is the shorter, and where lengths do not tell. Empty strata are left out. All (P,).

    Lengths match if they differ by at most a tenth of the longer. They are in tokens as the model reads them: two answers that were cut match.
    """
    matched = 10 * (chosen_tokens - rejected_tokens).abs() <= torch.maximum(chosen_tokens, rejected_tokens)
    longer = chosen_tokens > rejected_tokens
    return _by_part(
        credits,
        question,
        {"longer_chosen": longer & ~matched, "shorter_chosen": ~longer & ~matched, "length_matched": matched},
        seed,
    )


def _by_part(credits: Tensor, question: Tensor, parts: dict[str, Tensor], seed: int) -> dict[str, Stratum]:
    return {
        name: measure(credits[part], question[part], seed=seed) for name, part in parts.items() if part.any()
    }


def accuracy_difference(ours: Tensor, theirs: Tensor, question: Tensor, *, seed: int = 0) -> Interval:
    """Accuracy minus another's on the same pairs, from -1 to 1, questions redrawn; we are better if ``low`` is above 0. credits (P,), (P,)."""
    return clustered_mean(ours - theirs, question, seed=seed, bounds=(-1.0, 1.0))


def clustered_mean(
    values: Tensor, question: Tensor, *, bounds: tuple[float, float], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """Mean over pairs with its 95 % percentile bootstrap interval, whole questions redrawn (Davison and Hinkley 1997, section 3.8). (P,), (P,).

    A redrawn question brings all its pairs, so the number of pairs varies with the draw. ``n`` is the number of pairs. One question says nothing
    about how questions differ: the interval is ``bounds`` then, the least and the greatest that a mean can be.
    """
    assert values.shape == question.shape
    assert len(values) > 0
    _, place, pairs = question.cpu().unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(pairs), dtype=torch.float64).index_add(0, place, values.cpu().double())
    mean = (sums.sum() / len(values)).item()
    if len(pairs) < 2:
        return Interval(mean, *bounds, len(values))
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(pairs), (len(pairs),), generator=generator) for _ in range(draws))
    means = torch.stack([sums[rows].sum() / pairs[rows].sum() for rows in drawn])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high, len(values))


def wider_interval(stratum: Stratum) -> Interval:
    """The wider of a stratum's intervals on either side: redrawn questions know what Wilson's does not, unless all are right or all wrong."""
    value, low, high, n = stratum.clustered
    return Interval(value, min(low, stratum.wilson.low), max(high, stratum.wilson.high), n)


def centre_by_question(values: Tensor, question: Tensor) -> Tensor:
    """Values less their question's mean, (S,) float64. Pairs say nothing about rewards across questions, so only what differs within one counts."""
    _, place, counts = question.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64, device=values.device).index_add(
        0, place, values.double()
    )
    centre: Tensor = (sums / counts)[place]
    return values.double() - centre


def spearman(
    first: Tensor, second: Tensor, *, question: Tensor | None = None, seed: int = 0, draws: int = RANK_DRAWS
) -> Interval:
    """Rank correlation of two columns, say rewards and token lengths of answers, with its 95 % interval. (S,), (S,), (S,).

    Equal values share their mean rank; NaN within [-1, 1] where a column is constant. The interval is Fisher's z with the variance
    (1 + rho^2 / 2) / (S - 3) (Bonett and Wright 2000), as if answers were independent. Answers to one ``question`` are not: with it, whole questions
    are redrawn, and the interval is the wider of both on either side.
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
        redrawn = _bootstrap_correlations(first, second, question, seed=seed, draws=draws)
        low, high = min(low, redrawn[0]), max(high, redrawn[1])
    return Interval(rho, low, high, n)


def _bootstrap_correlations(
    first: Tensor, second: Tensor, question: Tensor, *, seed: int, draws: int
) -> tuple[float, float]:
    """The middle 95 % of the rank correlations of redrawn questions, each of which brings all its answers."""
    _, place, counts = question.cpu().unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return -1.0, 1.0
    order, starts = place.argsort(stable=True), counts.cumsum(0) - counts
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        drawn = torch.randint(len(counts), (len(counts),), generator=generator)
        size = counts[drawn]
        ends = size.cumsum(0)
        rows = order[torch.arange(int(ends[-1])) + (starts[drawn] - ends + size).repeat_interleave(size)]
        found.append(_correlation(first[rows], second[rows]))
    values = torch.tensor([value for value in found if not math.isnan(value)], dtype=torch.float64)
    if not len(values):
        return -1.0, 1.0
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the ranks."""
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    rho: float = (a @ b / (a.norm() * b.norm())).clamp(-1, 1).item()
    return rho


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1, (S,) float64; equal values share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    return ranks
