"""Intervals against scipy, and who wins."""

import math

import pytest
from scipy.stats import binomtest, norm

from tasks.rlhf.intervals import mean_interval, wilson
from tasks.rlhf.judging import Tally, compare, ordering_agreement


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (1, 3), (280, 400), (9_400, 10_000), (7, 13)])
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


def test_tally_counts_a_tie_as_half_a_win() -> None:
    tally = compare([3.0, 1.0, 2.0, 2.0], [1.0, 3.0, 2.0, 0.0])
    assert tally == Tally(wins=2, ties=1, losses=1)
    assert tally.win_rate.value == 0.625
    assert compare([1.0], [1.05], tie=0.1) == Tally(0, 1, 0)


def test_a_comparison_and_its_reverse_sum_to_one() -> None:
    ours, theirs = [0.3, 0.1, 0.7, 0.7, -1.0], [0.2, 0.4, 0.7, 0.1, -2.0]
    assert compare(ours, theirs).win_rate.value + compare(theirs, ours).win_rate.value == pytest.approx(1.0)


def test_agreement_is_over_pairs_that_the_truth_tells_apart() -> None:
    share = ordering_agreement([[0.9, 0.5, 0.5], [1.0, 2.0]], [[3, 2, 1], [4, 4]])
    assert (share.value, share.n) == (pytest.approx(2.5 / 3), 3)  # two right, one tie counted half; (4, 4) is no pair
    assert ordering_agreement([[1.0, 2.0]], [[2, 1]]).value == 0.0
