"""Rank policies by all their comparisons: Bradley-Terry with ties, as Davidson (1970) has them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, special
from scipy.sparse import csgraph

from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.evaluation.resampling import percentiles, question_numbers, redraw

DRAWS = 500
PRIOR = 0.5  # wins and losses against the field that each policy is given: who won all stays finite
MAX_STEPS, MAX_STEP, PRECISION = 100, 2.0, 1e-9  # of Newton's method
LEAST_LOG_TIE = -20.0
EQUAL_DECIMALS = 7  # of strengths that count as equal: those of policies that tied in every battle
ELO = 400 / np.log(10)  # Elo's points for a unit of log strength


class Fit(NamedTuple):
    """The strengths that explain the comparisons best."""

    log_strengths: NDArray[np.float64]  # (P,), mean 0
    tie: float  # nu: P(tie) = nu sqrt(p_i p_j) / (p_i + p_j + nu sqrt(p_i p_j))
    loss: float  # negative log-likelihood, without the prior


class Row(NamedTuple):
    """A policy on the leaderboard. Intervals redraw questions."""

    policy: str
    strength: Interval  # log strength, mean 0 over the policies
    elo: float  # the same on Elo's scale, around 1000: a label, no more
    ranks: list[float]  # probability of each rank, the best first


def fit(wins: NDArray[np.float64], ties: NDArray[np.float64], *, prior: float = PRIOR) -> Fit:
    """Fit log strengths and the tie parameter by maximum likelihood.

    wins (P, P): how often the row's policy beat the column's; ties (P, P): symmetric. ``prior`` is added as
    wins and losses of every policy against one of mean strength. With prior 0 the strengths of a policy that
    won or lost everything are infinite, which the caller must exclude.
    """
    theta = _maximise(wins[None], ties[None], prior)[0]
    strengths, log_nu = theta[:-1], float(theta[-1])
    design, counts = _design(len(wins)), _counts(wins[None], ties[None])[0]
    terms = design @ theta
    loss = float((counts.sum(axis=1) * np.logaddexp.reduce(terms, axis=1)).sum() - (counts * terms).sum())
    return Fit(strengths - strengths.mean(), float(np.exp(log_nu)) if ties.any() else 0.0, loss)


def _design(size: int) -> NDArray[np.float64]:
    """Return the weights of log strengths and log nu in log win, log loss and log tie, (pairs, 3, P + 1)."""
    first, second = np.triu_indices(size, 1)
    pairs = np.arange(len(first))
    design = np.zeros((len(first), 3, size + 1))
    design[pairs, 0, first] = design[pairs, 1, second] = 1
    design[pairs, 2, first] = design[pairs, 2, second] = 0.5
    design[:, 2, size] = 1
    return design


def _counts(wins: NDArray[np.float64], ties: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the numbers of wins, losses and ties of each pair, (D, P, P) -> (D, pairs, 3)."""
    first, second = np.triu_indices(wins.shape[-1], 1)
    return np.stack([wins[:, first, second], wins[:, second, first], ties[:, first, second]], axis=2)


def _maximise(wins: NDArray[np.float64], ties: NDArray[np.float64], prior: float) -> NDArray[np.float64]:
    """Return log strengths and log nu of D sets of comparisons, (D, P + 1), by Newton's method.

    The logarithms of win, loss and tie are linear in them, so the likelihood is that of a multinomial logit,
    which has one maximum. Log nu falls towards minus infinity in a set without ties, and stays at the bound.
    """
    size, counts = wins.shape[-1], _counts(wins, ties)
    design, games = _design(size), counts.sum(axis=2)
    theta = np.zeros((len(wins), size + 1))
    own = np.arange(size)
    for _ in range(MAX_STEPS):
        terms = np.einsum("ktp,dp->dkt", design, theta)
        shares = np.exp(terms - np.logaddexp.reduce(terms, axis=2)[..., None])
        gradient = np.einsum("dkt,ktp->dp", counts - games[..., None] * shares, design)
        means = np.einsum("dkt,ktp->dkp", shares, design)
        curvature = np.einsum("dkt,ktp,ktq->dpq", games[..., None] * shares, design, design, optimize=True)
        curvature -= np.einsum("dk,dkp,dkq->dpq", games, means, means, optimize=True)
        against_mean = special.expit(theta[:, :size])
        gradient[:, :size] += prior * (1 - 2 * against_mean)
        curvature[:, own, own] += 2 * prior * against_mean * (1 - against_mean)
        curvature[:, :size, :size] += 1e-6  # the sum of the strengths is free without a prior
        curvature[:, size, size] += 1e-9
        step = np.clip(np.linalg.solve(curvature, gradient[..., None])[..., 0], -MAX_STEP, MAX_STEP)
        theta += step
        np.maximum(theta[:, size], LEAST_LOG_TIE, out=theta[:, size])
        moving = (theta[:, size] > LEAST_LOG_TIE) | (step[:, size] > 0)
        if max(np.abs(step[:, :size]).max(), np.abs(step[moving, size]).max(initial=0)) < PRECISION:
            break
    return theta


def rank(
    policies: Sequence[str],
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    outcomes: NDArray[np.float64],
    questions: NDArray[np.int64],
    *,
    seed: int = 0,
) -> list[Row]:
    """Return the leaderboard, best first.

    first, second (N,): numbers of the compared policies; outcomes (N,) of the first one, NaN is left out;
    questions (N,): ids. All comparisons of a question are drawn together, so that what makes a question hard
    falls on all policies. Raises ValueError if the policies are not connected by comparisons.
    """
    known = ~np.isnan(outcomes)
    first, second, outcomes = first[known], second[known], outcomes[known]
    numbers, size = question_numbers(questions[known]), len(policies)
    _check_connected(first, second, policies)
    num_questions = int(numbers.max()) + 1
    shape = (num_questions, 2, size, size)
    tables = np.zeros(shape)
    for outcome, i, j in ((1, first, second), (0, second, first)):
        chosen = outcomes == outcome
        np.add.at(tables, (numbers[chosen], 0, i[chosen], j[chosen]), 1)
    tied = outcomes == 0.5
    for i, j in ((first, second), (second, first)):
        np.add.at(tables, (numbers[tied], 1, i[tied], j[tied]), 1)
    best = fit(*tables.sum(axis=0))
    drawn = redraw(tables, draws=DRAWS, seed=seed)
    draws = _maximise(drawn[:, 0], drawn[:, 1], PRIOR)[:, :size]
    draws -= draws.mean(axis=1, keepdims=True)
    ranks = _share_ranks(draws)
    rows = []
    for number in np.argsort(-best.log_strengths, kind="stable"):
        value = float(best.log_strengths[number])
        interval = Interval(value, *percentiles(draws[:, number]), num_questions)
        rows.append(Row(policies[number], interval, float(1000 + ELO * value), ranks[number].tolist()))
    return rows


def _share_ranks(draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of draws (D, P) in which each policy has each rank, (P, P); equal ones share ranks."""
    strengths = draws.round(EQUAL_DECIMALS)
    better = (strengths[:, None, :] > strengths[:, :, None]).sum(axis=2)[..., None]  # (D, P, 1)
    equal = (strengths[:, None, :] == strengths[:, :, None]).sum(axis=2)[..., None]  # with itself
    places = np.arange(draws.shape[1])
    shares: NDArray[np.float64] = (((places >= better) & (places < better + equal)) / equal).mean(axis=0)
    return shares


def _check_connected(first: NDArray[np.int64], second: NDArray[np.int64], policies: Sequence[str]) -> None:
    size = len(policies)
    graph = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(size, size))
    parts, labels = csgraph.connected_components(graph, directed=False)
    if parts > 1:
        apart = [name for name, label in zip(policies, labels, strict=True) if label != labels[0]]
        raise ValueError(f"{', '.join(apart)} and {policies[0]} have no comparisons that connect them")
