"""Rank policies by all their comparisons: Bradley-Terry with ties, as Davidson (1970) has them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse
from scipy.sparse import csgraph

from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.resampling import draw_weights, percentiles, question_numbers

DRAWS = 500
PRIOR = 0.5  # wins and losses against the field that each policy is given: who won all stays finite
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


def fit(
    wins: NDArray[np.float64],
    ties: NDArray[np.float64],
    *,
    prior: float = PRIOR,
    start: NDArray[np.float64] | None = None,
) -> Fit:
    """Fit log strengths and the tie parameter by maximum likelihood.

    wins (P, P): how often the row's policy beat the column's; ties (P, P): symmetric. ``prior`` is added as
    wins and losses of every policy against one of mean strength. With prior 0 the strengths of a policy that
    won or lost everything are infinite, which the caller must exclude.
    """
    size = len(wins)
    first, second = np.triu_indices(size, 1)
    won, lost, tied = wins[first, second], wins[second, first], ties[first, second]
    has_ties = bool(tied.sum() > 0)

    def loss(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        strength, log_nu = theta[:size], theta[size]
        terms = np.stack(
            [strength[first], strength[second], log_nu + (strength[first] + strength[second]) / 2]
        )
        if not has_ties:
            terms[2] = -np.inf
        top = np.logaddexp.reduce(terms, axis=0)
        shares = np.exp(terms - top)  # of win, loss and tie
        counts = won + lost + tied
        value = (counts * top).sum() - (won * terms[0] + lost * terms[1]).sum()
        value -= (tied * terms[2]).sum() if has_ties else 0.0
        by_first = counts * (shares[0] + shares[2] / 2) - won - tied / 2
        by_second = counts * (shares[1] + shares[2] / 2) - lost - tied / 2
        gradient = np.zeros(size + 1)
        np.add.at(gradient, first, by_first)
        np.add.at(gradient, second, by_second)
        gradient[size] = (counts * shares[2] - tied).sum() if has_ties else 0.0
        value += prior * (2 * np.logaddexp(0, strength) - strength).sum()
        gradient[:size] += prior * (2 / (1 + np.exp(-strength)) - 1)
        return value, gradient

    begin = np.zeros(size + 1) if start is None else start
    found = optimize.minimize(loss, begin, jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "gtol": 1e-8})
    strengths = found.x[:size]
    prior_loss = prior * (2 * np.logaddexp(0, strengths) - strengths).sum()
    nu = float(np.exp(found.x[size])) if has_ties else 0.0
    return Fit(strengths - strengths.mean(), nu, float(found.fun - prior_loss))


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
    start = np.r_[best.log_strengths, np.log(best.tie) if best.tie else 0.0]
    draws = np.array(
        [
            fit(*np.tensordot(weights, tables, 1), start=start).log_strengths
            for weights in draw_weights(num_questions, draws=DRAWS, seed=seed)
        ]
    )
    places = (-draws).argsort(axis=1).argsort(axis=1)  # (D, P)
    rows = []
    for number in np.argsort(-best.log_strengths, kind="stable"):
        value = float(best.log_strengths[number])
        interval = Interval(value, *percentiles(draws[:, number]), num_questions)
        shares = [float((places[:, number] == place).mean()) for place in range(size)]
        rows.append(Row(policies[number], interval, float(1000 + ELO * value), shares))
    return rows


def _check_connected(first: NDArray[np.int64], second: NDArray[np.int64], policies: Sequence[str]) -> None:
    size = len(policies)
    graph = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(size, size))
    parts, labels = csgraph.connected_components(graph, directed=False)
    if parts > 1:
        apart = [name for name, label in zip(policies, labels, strict=True) if label != labels[0]]
        raise ValueError(f"{', '.join(apart)} and {policies[0]} have no comparisons that connect them")
