"""Test length-controlled win rates: planted judges, an independent fit, and separable data."""

import numpy as np
import pytest
from scipy import optimize, special

from tasks.rlhf.judging.length_control import controlled_rate, length_feature
from tasks.rlhf.judging.win_rate import win_rate

N = 500
RNG = np.random.default_rng(5)
OURS, THEIRS = RNG.normal(260, 80, N), RNG.normal(200, 80, N)  # our answers are longer
FEATURE = length_feature(OURS, THEIRS)[:, None]
QUESTIONS = np.arange(N)


def test_a_judge_of_length_has_a_high_rate_and_a_controlled_one_that_holds_one_half() -> None:
    outcomes = (OURS > THEIRS).astype(float)
    assert win_rate(outcomes, QUESTIONS).low > 0.6
    found = controlled_rate(outcomes, FEATURE, QUESTIONS)
    assert found.low < 0.5 < found.high


def test_a_noisy_judge_of_length_too() -> None:
    chance = special.expit(4 * FEATURE[:, 0])
    held = 0
    for seed in range(40):
        outcomes = (np.random.default_rng(seed).random(N) < chance).astype(float)
        found = controlled_rate(outcomes, FEATURE, QUESTIONS)
        held += found.low <= 0.5 <= found.high
    assert held >= 35


def test_a_judge_that_does_not_look_at_length_is_not_changed() -> None:
    outcomes = RNG.choice([1, 0.5, 0], size=N, p=[0.6, 0.1, 0.3])
    raw, found = win_rate(outcomes, QUESTIONS), controlled_rate(outcomes, FEATURE, QUESTIONS)
    assert found.value == pytest.approx(raw.value, abs=0.04)
    assert found.low < 0.65 < found.high


def test_it_is_the_maximum_of_the_likelihood() -> None:
    outcomes = RNG.choice([1, 0.5, 0], size=N, p=[0.5, 0.2, 0.3])
    x = np.column_stack([FEATURE, RNG.normal(size=N)])

    def loss(beta: np.ndarray) -> float:
        z = beta[0] + x @ beta[1:]
        return float((np.logaddexp(0, z) - outcomes * z).sum() + N * 1e-4 * (beta[1:] ** 2).sum() / 2)

    expected = optimize.minimize(
        loss, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-10}
    )
    found = controlled_rate(outcomes, x, QUESTIONS)
    assert found.value == pytest.approx(special.expit(expected.x[0]), abs=1e-5)


def test_equal_outcomes_and_equal_lengths_are_no_failure() -> None:
    won = controlled_rate(np.ones(2), FEATURE[:2], QUESTIONS[:2])
    assert won == pytest.approx(win_rate(np.ones(2), QUESTIONS[:2]))
    same = length_feature(np.ones(30), np.ones(30))
    assert not same.any()
    outcomes = np.arange(30) % 3 / 2
    assert controlled_rate(outcomes, same[:, None], QUESTIONS[:30]).value == pytest.approx(0.5)
    assert controlled_rate(np.full(3, np.nan), FEATURE[:3], QUESTIONS[:3]).n == 0
