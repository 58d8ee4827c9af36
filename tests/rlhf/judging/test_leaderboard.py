"""Test Bradley-Terry with ties: golden values, ranks, and policies that won everything."""

import numpy as np
import pytest
from scipy import optimize

from tasks.rlhf.judging.leaderboard import fit, rank

GAMES = {(0, 1): (30, 20, 10), (0, 2): (25, 20, 15), (1, 2): (18, 24, 18)}


def tables(games: dict[tuple[int, int], tuple[int, int, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    wins, ties = np.zeros((size, size)), np.zeros((size, size))
    for (i, j), (won, tied, lost) in games.items():
        wins[i, j], wins[j, i], ties[i, j], ties[j, i] = won, lost, tied, tied
    return wins, ties


def test_golden() -> None:
    found = fit(*tables(GAMES, 3), prior=0)
    assert found.log_strengths == pytest.approx([0.540983, -0.360615, -0.180367], abs=1e-5)
    assert found.tie == pytest.approx(1.166004, abs=1e-5)
    assert found.loss == pytest.approx(191.382653, abs=1e-5)


def test_it_is_the_maximum_of_davidsons_likelihood() -> None:
    wins, ties = tables({(0, 1): (9, 3, 4), (1, 2): (8, 1, 5), (2, 3): (7, 2, 7), (0, 3): (5, 5, 2)}, 4)

    def loss(theta: np.ndarray) -> float:
        p, nu, total = np.exp(theta[:4]), np.exp(theta[4]), 0.0
        for i in range(4):
            for j in range(i + 1, 4):
                even = nu * np.sqrt(p[i] * p[j])
                chances = np.array([p[i], even, p[j]]) / (p[i] + p[j] + even)
                total -= np.array([wins[i, j], ties[i, j], wins[j, i]]) @ np.log(chances)
        return float(total + 1e-9 * (theta[:4] ** 2).sum())

    expected = optimize.minimize(loss, np.zeros(5), method="BFGS").x[:4]
    assert fit(wins, ties, prior=0).log_strengths == pytest.approx(expected - expected.mean(), abs=1e-4)


def test_without_ties_it_is_bradley_terry() -> None:
    wins, ties = tables({(0, 1): (30, 0, 10)}, 2)
    found = fit(wins, ties, prior=0)
    assert found.log_strengths[0] - found.log_strengths[1] == pytest.approx(np.log(3), abs=1e-4)
    assert found.tie == 0


def board(outcomes: np.ndarray, size: int = 3) -> list:
    """Rank policies by outcomes (Q, pairs) of the pairs in the order of triu_indices."""
    first, second = np.triu_indices(size, 1)
    num_questions = len(outcomes)
    questions = np.repeat(np.arange(num_questions), len(first))
    names = ["a", "b", "c", "d"][:size]
    return rank(
        names, np.tile(first, num_questions), np.tile(second, num_questions), outcomes.ravel(), questions
    )


def test_who_won_everything_is_first_and_finite() -> None:
    rows = board(np.tile([1.0, 1.0, 0.5], (40, 1)))
    assert rows[0].policy == "a"
    assert rows[0].ranks[0] == 1
    assert all(np.isfinite(end) for row in rows for end in row.strength[:3])
    assert rows[1].strength.value == pytest.approx(rows[2].strength.value)


def test_probabilities_of_ranks_sum_to_one_both_ways_and_equals_share_them() -> None:
    rng = np.random.default_rng(0)
    rows = board(rng.choice([1, 0.5, 0], size=(200, 3)))
    ranks = np.array([row.ranks for row in rows])
    np.testing.assert_allclose(ranks.sum(axis=0), 1)
    np.testing.assert_allclose(ranks.sum(axis=1), 1)
    assert ranks.max() < 0.98


def test_an_interval_covers_the_true_strength() -> None:
    strengths = np.array([0.6, 0.0, -0.6])
    first, second = np.triu_indices(3, 1)
    chance = 1 / (1 + np.exp(strengths[second] - strengths[first]))
    covered = 0
    for seed in range(25):
        outcomes = (np.random.default_rng(seed).random((150, 3)) < chance).astype(float)
        found = {row.policy: row.strength for row in board(outcomes)}
        covered += found["a"].low <= 0.6 <= found["a"].high
    assert covered >= 21


def test_policies_that_nothing_connects_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="c and a have no comparisons"):
        rank(["a", "b", "c"], np.array([0]), np.array([1]), np.array([1.0]), np.array([0]))
    with pytest.raises(ValueError, match="b and a"):
        rank(["a", "b"], np.array([0]), np.array([1]), np.array([np.nan]), np.array([0]))


def test_policies_that_tie_in_every_battle_share_the_ranks() -> None:
    first, second, outcomes = (
        np.array([0, 0, 1] * 20),
        np.array([1, 2, 2] * 20),
        np.array([0.5, 1.0, 1.0] * 20),
    )
    rows = rank(["one", "other", "worst"], first, second, outcomes, np.repeat(np.arange(20), 3))
    assert {row.policy: row.ranks for row in rows} == {
        "one": [0.5, 0.5, 0.0],
        "other": [0.5, 0.5, 0.0],
        "worst": [0.0, 0.0, 1.0],
    }
