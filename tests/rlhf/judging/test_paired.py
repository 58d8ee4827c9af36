"""Test paired comparisons: McNemar's golden values, and the interval against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from tasks.rlhf.judging.paired import mcnemar, paired_difference


@pytest.mark.parametrize(
    ("b", "c", "p"), [(15, 5, 0.041389), (8, 8, 1), (3, 0, 0.25), (40, 20, 0.013489), (0, 0, 1)]
)
def test_mcnemar_golden(b: int, c: int, p: float) -> None:
    assert mcnemar(b, c) == pytest.approx(p, abs=1e-6)
    assert mcnemar(c, b) == pytest.approx(mcnemar(b, c))


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 50))
    expected = stats.ttest_rel(first, second).confidence_interval()
    found = paired_difference(first, second)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert paired_difference(first[:1], second[:1])[1:] == (-math.inf, math.inf, 1)


def test_models_that_agree_on_all_documents_have_no_point_for_an_interval() -> None:
    same = np.array([1.0, 0, 1, 1, 0] * 20)
    found = paired_difference(same, same)
    assert found.value == 0
    assert -0.05 < found.low < 0 < found.high < 0.05


def test_the_interval_of_shares_is_bonett_and_prices() -> None:
    first, second = np.repeat([1.0, 0, 1, 0], [15, 5, 40, 40]), np.repeat([0.0, 1, 1, 0], [15, 5, 40, 40])
    found = paired_difference(first, second)
    half = 1.959964 * math.sqrt((22 / 102 - (10 / 102) ** 2) / 102)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((10 / 102 - half, 10 / 102 + half))


def test_the_interval_of_shares_holds_the_truth() -> None:
    rng, held = np.random.default_rng(1), 0
    for _ in range(1000):
        first = (rng.random(80) < 0.6).astype(float)
        second = np.where(rng.random(80) < 0.8, first, rng.random(80) < 0.6).astype(float)
        found = paired_difference(first, second)
        held += found.low <= 0 <= found.high
    assert 0.93 <= held / 1000 <= 0.98
