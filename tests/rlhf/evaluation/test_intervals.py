"""Test confidence intervals against scipy, and the agreement of two judges."""

import math
import random

import pytest
import torch
from scipy.stats import binomtest, norm, pearsonr

from tasks.rlhf.evaluation.intervals import mean_interval, pearson, wilson
from tasks.rlhf.evaluation.ordering_agreement import ordering_agreement


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 3), (280, 400), (9_400, 10_000), (7, 13)]
)
def test_wilson_is_scipys(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    share = wilson(successes, n)
    assert (share.value, share.n) == (successes / n, n)
    assert share.low == pytest.approx(expected.low, abs=1e-6)
    assert share.high == pytest.approx(expected.high, abs=1e-6)


def test_wilson_by_hand() -> None:
    assert wilson(8, 10)[:3] == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-4)


def test_no_observations_say_nothing() -> None:
    share = wilson(0, 0)
    assert math.isnan(share.value)
    assert share[1:] == (0.0, 1.0, 0)


def test_more_wins_than_games_are_refused() -> None:
    with pytest.raises(AssertionError):
        wilson(3, 2)


def test_mean_interval() -> None:
    share = mean_interval([1.0, 2.0, 3.0, 6.0])
    half = norm.ppf(0.975) * math.sqrt(14 / 3 / 4)
    assert share.value == 3.0
    assert (share.low, share.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert mean_interval([2.0]) == (2.0, -math.inf, math.inf, 1)


def test_agreement_is_over_pairs_that_the_truth_tells_apart() -> None:
    share = ordering_agreement([[0.9, 0.5, 0.5], [1.0, 2.0]], [[3, 2, 1], [4, 4]])
    assert (share.value, share.n) == (
        pytest.approx(2 / 3),
        3,
    )  # two right, and a tie, which is no success; (4, 4) is no pair
    assert ordering_agreement([[1.0, 2.0]], [[2, 1]]).value == 0.0
    assert ordering_agreement([[1e-200, 2e-200]], [[1e-200, 2e-200]]).value == 1.0  # whose product is 0
    assert ordering_agreement([[1.0, 2.0]], [[3, 3]])[1:] == (0.0, 1.0, 0)


def test_a_judge_that_is_right_of_whole_questions_has_a_wider_interval_than_wilsons() -> None:
    """400 questions of four pairs (one answer against four worse ones), of which a judge orders all or none.

    That is 400 observations, not 1,600: with the pairs' correlation rho = .37 within questions the variance
    is 1 + 3 rho = 2.1 times as large, and the interval 1.45 times as wide.
    """
    truth = [[1, 0, 0, 0, 0]] * 400
    whole = ordering_agreement(
        [[1.0, *[0.0] * 4] if i % 4 else [-1.0, *[0.0] * 4] for i in range(400)], truth
    )
    assert (whole.value, whole.n) == (0.75, 1600)
    assert whole.high - whole.low == pytest.approx(
        2 * (wilson(1200, 1600).high - wilson(1200, 1600).low), rel=0.08
    )  # sqrt(4)
    rng = random.Random(0)
    mixed = []
    for _ in range(400):
        common = (
            rng.random() < 0.75
        )  # which each pair follows with probability sqrt(rho), else it has a draw of its own
        mixed.append(
            [
                0.0,
                *(
                    -1.0 if (common if rng.random() < 0.37**0.5 else rng.random() < 0.75) else 1.0
                    for _ in range(4)
                ),
            ]
        )
    found = ordering_agreement(mixed, truth)
    plain = wilson(found.value * found.n, found.n)
    assert found.high - found.low == pytest.approx(1.45 * (plain.high - plain.low), rel=0.08)


def test_independent_pairs_have_wilsons_interval() -> None:
    rng = random.Random(1)
    judged = [[float(rng.random() < 0.7), 0.5] for _ in range(400)]
    found = ordering_agreement(judged, [[1, 0]] * 400)
    plain = wilson(found.value * found.n, found.n)
    assert found.high - found.low == pytest.approx(plain.high - plain.low, rel=0.1)


def test_a_correlations_interval_is_scipys() -> None:
    a, b = torch.randn(2, 60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = pearsonr(a.numpy(), (a + b).numpy())
    found = pearson(a, a + b)
    assert found.value == pytest.approx(expected.statistic)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()), abs=1e-6)
    assert pearson(a[:3], b[:3])[1:] == (-1.0, 1.0, 3)
    assert pearson(a, 2 * a)[:3] == pytest.approx((1, 1, 1))
