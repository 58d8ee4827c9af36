"""Test running moments: by hand, against torch on all values, and whatever the batches."""

import pytest
import torch

from tasks.rlhf.algorithms.running_moments import Moments, combine, moments_of, normalise


def test_moments_computed_by_hand() -> None:
    first = combine(Moments(), moments_of(torch.tensor([1.0, 3.0])))
    assert first == (2, 2.0, 2.0)
    both = combine(first, moments_of(torch.tensor([5.0])))
    assert both == (3, 3.0, 8.0)  # 4 + 0 + 4
    assert both.deviation == pytest.approx((8 / 3) ** 0.5)


def test_they_are_those_of_all_values_whatever_the_batches() -> None:
    torch.manual_seed(0)
    values = 1e4 + torch.randn(100)
    for sizes in ([100], [1] * 100, [30, 0, 70]):
        moments = Moments()
        for part in values.split(sizes):
            moments = combine(moments, moments_of(part))
        assert moments.num_values == 100
        assert moments.mean == pytest.approx(values.double().mean().item(), rel=1e-12)
        assert moments.deviation == pytest.approx(values.double().std(correction=0).item(), rel=1e-6)
        scaled = normalise(values, moments)
        assert scaled.dtype == torch.float32
        assert scaled.mean().item() == pytest.approx(0, abs=1e-5)
        assert scaled.std(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0, 2.0]])
def test_values_that_do_not_vary_are_not_scaled(values: list[float]) -> None:
    moments = combine(Moments(), moments_of(torch.tensor(values)))
    assert moments.deviation == 1
    assert normalise(torch.tensor([2.5]), moments).item() == pytest.approx(2.5 - moments.mean)
