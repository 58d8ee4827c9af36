"""Test report cards of judges: kappa's golden values, planted judges, and rank correlation against scipy."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from tasks.rlhf.judging.agreement import (
    ReportCard,
    cohens_kappa,
    grade_judge,
    is_better_than_length,
    kappa_interval,
    rank_correlation,
)


@pytest.mark.parametrize(
    ("table", "kappa"), [([[40, 10], [15, 35]], 0.5), ([[30, 5, 5], [6, 20, 4], [4, 6, 20]], 0.545455)]
)
def test_kappa_golden(table: list[list[int]], kappa: float) -> None:
    counts = np.array(table, dtype=float)
    assert cohens_kappa(counts) == pytest.approx(kappa, abs=1e-6)
    first, second = (
        np.repeat(labels.ravel(), counts.astype(int).ravel()) for labels in np.indices(counts.shape)
    )
    found = kappa_interval(first, second, np.arange(len(first)))
    assert found.value == pytest.approx(kappa, abs=1e-6)
    assert found.low < kappa < found.high


def test_kappa_of_chance_is_0_of_agreement_1_and_undefined_for_constant_raters() -> None:
    assert cohens_kappa(np.full((3, 3), 5.0)) == pytest.approx(0)
    assert cohens_kappa(np.diag([3.0, 4.0])) == pytest.approx(1)
    assert np.isnan(cohens_kappa(np.array([[7.0, 0], [0, 0]])))


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=200)
    b = np.round(a + rng.normal(size=200), 1)  # with ties
    found = rank_correlation(a, b, np.arange(200))
    assert found.value == pytest.approx(stats.spearmanr(a, b).statistic)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * (1 - found.value**2) / 200**0.5, rel=0.25)


NUM_PAIRS = 900
RNG = np.random.default_rng(4)
LENGTHS = RNG.integers(20, 400, size=(NUM_PAIRS, 2)).astype(float)
QUESTIONS = np.arange(NUM_PAIRS) // 3


def card(forward: NDArray[np.float64], backward: NDArray[np.float64]) -> ReportCard:
    return grade_judge(forward, backward, LENGTHS, QUESTIONS)


def test_a_judge_that_prefers_the_first_answer_is_as_good_as_a_coin_and_never_consistent() -> None:
    found = card(np.ones(NUM_PAIRS), np.zeros(NUM_PAIRS))
    assert found.agreement.value == 0.5
    assert found.consistency.value == 0
    assert (found.right_if_first.value, found.right_if_second.value) == (1, 0)
    assert found.kappa.value == pytest.approx(0)
    assert not is_better_than_length(found)


def test_a_judge_of_length_is_the_rule_itself() -> None:
    longer = (LENGTHS[:, 0] > LENGTHS[:, 1]).astype(float)
    found = card(longer, longer)
    assert found.agreement == pytest.approx(found.longer_wins, abs=0.01)
    assert found.length_pull.value > 0.8
    assert found.consistency.value == 1
    assert not is_better_than_length(found)


def test_a_judge_that_follows_the_votes_is_better_and_has_no_pull_of_length() -> None:
    right = (RNG.random(NUM_PAIRS) < 0.8).astype(float)
    found = card(right, right)
    assert found.agreement.low < 0.8 < found.agreement.high
    assert found.kappa.value == pytest.approx(2 * found.agreement.value - 1)
    assert found.length_pull.low < 0.02
    assert abs(found.length_pull.value) < 0.1
    assert is_better_than_length(found)


def test_verdicts_that_cannot_be_read_lower_no_agreement() -> None:
    right = np.ones(NUM_PAIRS)
    broken = right.copy()
    broken[:90] = np.nan
    found = card(right, broken)
    assert found.unparseable == pytest.approx(0.1)
    assert found.agreement.value == 1
    nothing = card(np.full(NUM_PAIRS, np.nan), right)
    assert nothing.unparseable == 1
    assert nothing.agreement.n == 0
    assert not is_better_than_length(nothing)


def test_pairs_of_equal_length_are_those_within_a_tenth() -> None:
    lengths = np.array([[100.0, 91], [100, 89], [50, 50], [10, 200]])
    found = grade_judge(np.array([1.0, 0, 1, 0]), np.array([1.0, 0, 1, 0]), lengths, np.arange(4))
    assert (found.equal_length.value, found.equal_length.n) == (1.0, 2)
