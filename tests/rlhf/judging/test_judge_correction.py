"""Test the correction of win rates for a judge's errors: golden values and coverage."""

import numpy as np
import pytest

from tasks.rlhf.judging.judge_correction import Graded, corrected_interval, corrected_rate


@pytest.mark.parametrize(
    ("rate", "q1", "q0", "theta"),
    [(0.60, 0.80, 0.80, 0.666667), (0.70, 0.85, 0.75, 0.75), (0.55, 0.70, 0.65, 0.571429)],
)
def test_golden(rate: float, q1: float, q0: float, theta: float) -> None:
    assert corrected_rate(rate, q1, q0) == pytest.approx(theta, abs=1e-6)


def test_it_inverts_what_a_judge_does_to_the_truth() -> None:
    for theta in (0.0, 0.3, 0.5, 0.9):
        seen = theta * 0.9 + (1 - theta) * (1 - 0.7)
        assert corrected_rate(seen, 0.9, 0.7) == pytest.approx(theta)


def graded(rng: np.random.Generator, q1: float, q0: float, n: int = 400) -> Graded:
    first, second = ((rng.random(n) < q).astype(float) for q in (q1, q0))
    return Graded(first, second, np.arange(n))


def test_a_noisy_judges_corrected_interval_covers_the_truth() -> None:
    theta, q1, q0, covered = 0.65, 0.85, 0.75, 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        seen = np.where(rng.random(400) < theta, rng.random(400) < q1, rng.random(400) >= q0).astype(float)
        found = corrected_interval(seen, np.arange(400), graded(rng, q1, q0), seed=seed)
        assert found is not None
        covered += found.low <= theta <= found.high
    assert 0.90 <= covered / 100 <= 0.99


def test_a_judge_that_guesses_is_not_corrected() -> None:
    rng = np.random.default_rng(1)
    outcomes = (rng.random(300) < 0.5).astype(float)
    assert corrected_interval(outcomes, np.arange(300), graded(rng, 0.5, 0.5)) is None
    always_first = Graded(np.ones(50), np.zeros(50), np.arange(50))
    assert corrected_interval(outcomes, np.arange(300), always_first) is None


def test_what_cannot_be_read_is_left_out() -> None:
    rng = np.random.default_rng(2)
    votes = graded(rng, 0.9, 0.9)
    outcomes = (rng.random(300) < 0.6).astype(float)
    whole = corrected_interval(outcomes, np.arange(300), votes)
    gaps = np.concatenate([outcomes, np.full(100, np.nan)])
    found = corrected_interval(gaps, np.arange(400), votes)
    assert whole is not None
    assert found is not None
    assert found.value == pytest.approx(whole.value)
