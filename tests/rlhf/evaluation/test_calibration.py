"""Test temperature and calibration error by hand, against scipy, and on draws with known truth."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binom
from torch import Tensor

from tasks.rlhf.algorithms.losses import pairwise_loss
from tasks.rlhf.evaluation.calibration import (
    TEMPERATURE_BOUND,
    expected_calibration_error,
    fit_temperature,
    noise_floor,
    reason_not_to_fit,
    reliability,
)
from tasks.rlhf.evaluation.intervals import wilson

LN3, LN9 = math.log(3), math.log(9)  # p = 0.75 and 0.9


def drawn(num_pairs: int, *, temperature: float, seed: int = 0) -> Tensor:
    """Return margins of a model whose order is right as often as p = sigmoid(|margin| / temperature) says."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 3 * torch.randn(num_pairs, generator=generator, dtype=torch.float64).abs()
    right = torch.rand(num_pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(
        sizes / temperature
    )
    return torch.where(right, sizes, -sizes)


@pytest.mark.parametrize("size", [0.02, 1.0, 7.0])
def test_three_right_of_four_with_one_margin_mean_three_quarters(size: float) -> None:
    """All margins have one size, so p is the same for all; the best p is the share that is right: size / T
    = log 3.
    """
    assert fit_temperature(torch.tensor([size, size, -size, size])) == pytest.approx(size / LN3, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_temperature_is_scipys(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    margins = torch.randn(60, generator=generator, dtype=torch.float64) * (seed + 0.3) + 0.4 * (seed + 0.3)

    def loss(log_temperature: float) -> float:
        scaled = margins / math.exp(log_temperature)
        return pairwise_loss(scaled, torch.zeros_like(scaled)).mean().item()

    expected = math.exp(minimize_scalar(loss, bounds=(-4, 8), method="bounded", options={"xatol": 1e-9}).x)
    assert fit_temperature(margins) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [1e-6, 0.37, 1e5])
@pytest.mark.parametrize(
    "margins", [[2.0, -1.0, 0.5, 3.0], [1.0, 2.0], [-1.0, 0.5]], ids=["fitted", "separable", "chance"]
)
def test_temperature_goes_with_the_margins(margins: list[float], factor: float) -> None:
    plain = torch.tensor(margins, dtype=torch.float64)
    assert fit_temperature(factor * plain) == pytest.approx(factor * fit_temperature(plain), rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_temperature_that_draws_were_made_with_is_found(temperature: float) -> None:
    assert fit_temperature(drawn(200_000, temperature=temperature)) == pytest.approx(temperature, rel=0.02)


@pytest.mark.parametrize(
    ("margins", "expected"),
    [
        ([1.0, 3.0], 2 / TEMPERATURE_BOUND),
        ([0.0, 4.0], 2 / TEMPERATURE_BOUND),
        ([1e9, *[0.0] * 999], 1e6 / TEMPERATURE_BOUND),
        ([-1.0, -3.0], 2 * TEMPERATURE_BOUND),
        ([1.0, -1.0], 1 * TEMPERATURE_BOUND),
        ([1.0, -3.0], 2 * TEMPERATURE_BOUND),
        ([0.0, 0.0], 1.0),
    ],
    ids=[
        "all right",
        "right or tied",
        "right, far from the mean",
        "all wrong",
        "as good as chance",
        "worse than chance",
        "all tied",
    ],
)
def test_what_has_no_best_temperature_gets_a_bound(margins: list[float], expected: float) -> None:
    assert fit_temperature(torch.tensor(margins)) == pytest.approx(expected)


def test_huge_margins_do_not_overflow() -> None:
    assert fit_temperature(torch.tensor([1e30, -1e30, 1e30, 1e30])) == pytest.approx(1e30 / LN3, rel=1e-5)


@pytest.mark.parametrize("bad", [[], [1.0, math.nan], [math.inf]])
def test_margins_that_are_no_numbers_are_refused(bad: list[float]) -> None:
    for function in (fit_temperature, expected_calibration_error):
        with pytest.raises(AssertionError):
            function(torch.tensor(bad))


def test_bins_by_hand() -> None:
    """Confidence 0.9 three times, two right; 0.75 twice, one right; a tie: confidence 0.5, half right."""
    margins = torch.tensor([LN9, LN9, -LN9, LN3, -LN3, 0.0], dtype=torch.float64)
    low, middle, high = reliability(margins)
    assert [b.confidence for b in (low, middle, high)] == pytest.approx([0.5, 0.75, 0.9])
    assert [b.accuracy.value for b in (low, middle, high)] == [0.5, 0.5, 2 / 3]
    assert low.accuracy[1:3] == (0, 1)  # one question says nothing
    for found, plain in ((middle.accuracy, wilson(1, 2)), (high.accuracy, wilson(2, 3))):
        assert found.low <= plain.low < plain.high <= found.high
    assert [low.n, middle.n, high.n] == [1, 2, 3]
    expected = 2 / 6 * 0.25 + 3 / 6 * (0.9 - 2 / 3)
    assert expected_calibration_error(margins) == pytest.approx(expected)


def test_one_bin_takes_means_before_the_difference() -> None:
    """Guo's eq. 3: |mean accuracy - mean confidence| of a bin: one at 0.9 wrong, one at 0.75 right: |0.5 -
    0.825|.
    """
    margins = torch.tensor([-LN9, LN3], dtype=torch.float64)
    assert expected_calibration_error(margins, bins=1) == pytest.approx(0.325)
    assert expected_calibration_error(margins) == pytest.approx((0.9 + 0.25) / 2)


def test_bins_halve_the_range_from_one_half_to_one() -> None:
    margins = torch.logit(torch.tensor([0.5001, 0.7499, 0.7501, 0.9999], dtype=torch.float64))
    assert [b.n for b in reliability(margins, bins=2)] == [2, 2]
    assert [b.n for b in reliability(torch.tensor([0.0, 1e9]), bins=10)] == [
        1,
        1,
    ]  # both ends belong to a bin


def test_the_temperature_divides() -> None:
    margins = drawn(2_000, temperature=1.0)
    assert expected_calibration_error(margins, 4.0) == expected_calibration_error(margins / 4)
    assert reliability(margins, 4.0) == reliability(margins / 4)


def test_calibrated_draws_have_no_error_and_only_they() -> None:
    margins = drawn(100_000, temperature=2.5)
    assert expected_calibration_error(margins, 2.5) < 0.01
    assert expected_calibration_error(margins, fit_temperature(margins)) < 0.01
    assert expected_calibration_error(margins) > 0.05  # too sure
    assert all(
        b.accuracy.low - 0.01 < b.confidence < b.accuracy.high + 0.01
        for b in reliability(margins[:20_000], 2.5)
    )


def test_a_model_and_its_contrary_are_as_sure() -> None:
    margins = drawn(500, temperature=1.0)
    ours, theirs = reliability(margins), reliability(-margins)
    assert [b.confidence for b in ours] == [b.confidence for b in theirs]
    assert [b.accuracy.value for b in ours] == pytest.approx([1 - b.accuracy.value for b in theirs])


def test_a_bin_of_one_questions_pairs_is_one_observation() -> None:
    margins = torch.full((400,), LN9, dtype=torch.float64) * torch.where(
        torch.arange(400) % 8 < 4, -1, 1
    )  # half of the questions right
    (alone,), (together,) = reliability(margins), reliability(margins, question=torch.arange(400) // 4)
    assert together.accuracy.value == alone.accuracy.value == 0.5
    assert together.accuracy.high - together.accuracy.low == pytest.approx(
        2 * (alone.accuracy.high - alone.accuracy.low), rel=0.12
    )


@pytest.mark.parametrize(("n", "p"), [(10, 0.75), (60, 0.9), (314, 0.97)])
def test_the_noise_floor_of_one_confidence_is_the_binomials_mean_deviation(n: int, p: float) -> None:
    """E |X / n - p| of X ~ Binomial(n, p), summed over all X by scipy."""
    margins = torch.full((n,), math.log(p / (1 - p)), dtype=torch.float64)
    expected = binom(n, p).expect(lambda x: abs(x / n - p))
    assert noise_floor(margins, draws=20_000) == pytest.approx(expected, rel=0.03)


def test_the_noise_floor_falls_with_the_root_of_the_pairs_and_knows_no_outcomes() -> None:
    few, many = drawn(300, temperature=1.0), drawn(30_000, temperature=1.0)
    assert noise_floor(few) == pytest.approx(10 * noise_floor(many), rel=0.1)
    assert 0.02 < noise_floor(few) < 0.06  # the issue's .038 on 314 pairs is of this kind
    assert noise_floor(few) == noise_floor(few.abs())
    assert noise_floor(few, 2.5) == noise_floor(few / 2.5)
    assert noise_floor(torch.zeros(5)) == 0  # ties are half right for certain
    assert noise_floor(few, seed=1) != noise_floor(few)


def test_a_perfect_model_shows_its_floor_in_the_mean() -> None:
    errors = [expected_calibration_error(drawn(300, temperature=1.0, seed=seed)) for seed in range(40)]
    assert sum(errors) / 40 == pytest.approx(noise_floor(drawn(300, temperature=1.0)), rel=0.15)


@pytest.mark.parametrize(
    ("margins", "reason"),
    [
        ([], "no two rewards differ"),
        ([0.0, 0.0], "no two rewards differ"),
        ([1.0, 2.0], "every held-out pair is ordered as its label says"),
        (
            [1.7e-6, 0.0, 1e-9],
            "every held-out pair is ordered as its label says",
        ),  # rounding alone once gave a temperature of 1.7e-8
        ([-1.0, -2.0], "no held-out pair is ordered"),
        ([-1.0, 0.5], "no better than chance"),
        ([1.0, -1.0], "no better than chance"),
        ([1.0, 2.0, -0.5], ""),
    ],
)
def test_margins_without_a_best_temperature_are_told_apart(margins: list[float], reason: str) -> None:
    found = reason_not_to_fit(torch.tensor(margins, dtype=torch.float64))
    assert found.startswith(reason) if not reason else reason in found
    assert bool(found) == bool(reason)
