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
