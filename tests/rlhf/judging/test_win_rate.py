"""Test win rates: golden values, coverage of their intervals, and how many questions are needed."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.evaluation.intervals import wilson
from tasks.rlhf.judging.win_rate import questions_needed, smallest_detectable, win_rate

EVALUATIONS = 1000


@pytest.mark.parametrize(
    ("counts", "value", "low", "high"),
    [
        ((120, 160, 120), 0.5, 0.4620, 0.5380),
        ((279, 197, 24), 0.755, 0.7292, 0.7808),
    ],
)
def test_golden(counts: tuple[int, int, int], value: float, low: float, high: float) -> None:
    outcomes = np.repeat([1, 0.5, 0], counts)
    found = win_rate(outcomes, np.arange(len(outcomes)))
    assert (found.value, found.n) == (pytest.approx(value), len(outcomes))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_few_questions_have_wilsons_interval_with_students_quantile() -> None:
    """By variance it would be .6158 to .8842, which holds the truth too rarely."""
    outcomes = np.repeat([1.0, 0.0], [30, 10])
    found = win_rate(outcomes, np.arange(40))
    expected = wilson(30, 40, z=stats.t.ppf(0.975, 39) * math.sqrt(40 / 39))
    assert found == pytest.approx(expected)
    assert (found.low, found.high) == pytest.approx((0.5907, 0.8618), abs=1e-4)


def simulate(
    rng: np.random.Generator, num_questions: int, rate: float, ties: float, per_question: int, effect: float
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return outcomes whose expected mean is ``rate``; ``effect`` is the share that a question decides."""
    chances = [rate - ties / 2, ties, 1 - rate - ties / 2]
    own = rng.choice([1, 0.5, 0], size=(num_questions, per_question), p=chances)
    common = rng.choice([1, 0.5, 0], size=(num_questions, 1), p=chances)
    follows = rng.random((num_questions, per_question)) < effect
    outcomes = np.where(follows, common, own)
    return outcomes.ravel(), np.repeat(np.arange(num_questions), per_question)


CASES = [
    (n, rate, ties, per_question)
    for n, rate in ((40, 0.5), (100, 0.6), (100, 0.75), (500, 0.75))
    for ties in (0.0, 0.4)
    for per_question in (1, 3)
]


@pytest.mark.parametrize(("n", "rate", "ties", "per_question"), CASES)
def test_intervals_cover_the_truth_in_95_of_100_evaluations(
    n: int, rate: float, ties: float, per_question: int
) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(EVALUATIONS):
        found = win_rate(*simulate(rng, n, rate, ties, per_question, effect=0.6))
        covered += found.low <= rate <= found.high
    assert 0.93 <= covered / EVALUATIONS <= 0.97


@pytest.mark.parametrize(("ties", "per_question"), [(0.4, 1), (0.0, 3)])
def test_wilsons_interval_on_half_wins_fails_the_same_test(ties: float, per_question: int) -> None:
    """It is too wide with ties, and too narrow if a question has several verdicts."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(EVALUATIONS):
        outcomes, _ = simulate(rng, 100, 0.6, ties, per_question, effect=0.6)
        found = wilson(outcomes.sum(), len(outcomes))
        covered += found.low <= 0.6 <= found.high
    assert not 0.93 <= covered / EVALUATIONS <= 0.97


def test_equal_outcomes_have_wilsons_interval_and_what_cannot_be_read_is_left_out() -> None:
    won = win_rate(np.array([1, 1, 1, np.nan]), np.arange(4))
    assert won == pytest.approx(wilson(3, 3))
    assert won.low < 0.5  # three questions show nothing
    nothing = win_rate(np.array([np.nan, np.nan]), np.arange(2))
    assert math.isnan(nothing.value)
    assert nothing[1:] == (0.0, 1.0, 0)


def test_ours_against_theirs_is_the_mirror_image() -> None:
    outcomes, questions = simulate(np.random.default_rng(2), 60, 0.7, 0.2, 3, 0.5)
    ours, theirs = win_rate(outcomes, questions), win_rate(1 - outcomes, questions)
    assert (1 - theirs.value, 1 - theirs.high, 1 - theirs.low) == pytest.approx(ours[:3])


@pytest.mark.parametrize(("rate", "needed"), [(0.52, 4903), (0.53, 2178), (0.55, 783), (0.60, 194)])
def test_questions_needed_golden(rate: float, needed: int) -> None:
    assert questions_needed(rate) in (needed, needed + 1)  # the golden values are rounded, not rounded up


def test_so_many_questions_do_have_the_power() -> None:
    rng, n = np.random.default_rng(3), questions_needed(0.6, tie_share=0.3)
    found = [win_rate(*simulate(rng, n, 0.6, 0.3, 1, 0.0)).low > 0.5 for _ in range(EVALUATIONS)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.04)
    assert n < questions_needed(0.6)  # ties have less variance


def test_the_smallest_detectable_rate_is_the_inverse() -> None:
    for n in (30, 100, 500, 5000):
        rate = smallest_detectable(n)
        assert rate is not None
        assert questions_needed(rate) <= n < questions_needed(rate - 0.002)
    assert smallest_detectable(3) is None
