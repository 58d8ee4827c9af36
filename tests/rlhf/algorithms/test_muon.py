"""Muon against torch's own, and what Newton and Schulz's iteration does to singular values."""

import pytest
import torch
from torch import Tensor, nn

from tasks.rlhf.algorithms import muon

SHAPES = [(8, 8), (6, 10), (10, 6)]


def matrices(shape: tuple[int, int], *, seed: int = 0, number: int = 3) -> Tensor:
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(seed))


def parameters(seed: int = 1) -> list[nn.Parameter]:
    return [
        nn.Parameter(matrices(shape, seed=seed + i, number=1)[0])
        for i, shape in enumerate([*SHAPES, SHAPES[0]])
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_singular_value_goes_through_the_polynomial_and_vectors_stay(shape: tuple[int, int]) -> None:
    given = matrices(shape)
    a, b, c = muon.COEFFICIENTS
    for matrix, found in zip(given, muon.orthogonalise(given, iterations=3), strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values = values / matrix.norm()
        for _ in range(3):
            values = a * values + b * values**3 + c * values**5
        torch.testing.assert_close(found, left @ values.diag() @ right, atol=1e-4, rtol=1e-4)


def test_the_golden_values_of_a_diagonal() -> None:
    # by hand, one iteration: x = s / 5; 3.4445 x - 4.775 x^3 + 2.0315 x^5
    found = muon.orthogonalise(torch.diag(torch.tensor([3.0, 4.0]))[None], iterations=1)[0]
    expected = torch.diag(torch.tensor([2.0667 - 1.0314 + 0.15796944, 2.7556 - 2.4448 + 0.66568192]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_size_and_transposition_change_nothing_else(shape: tuple[int, int]) -> None:
    given = matrices(shape)
    found = muon.orthogonalise(given)
    torch.testing.assert_close(muon.orthogonalise(1e4 * given), found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(muon.orthogonalise(given.mT.contiguous()).mT, found, atol=1e-4, rtol=1e-4)
    assert torch.equal(muon.orthogonalise(torch.zeros(1, *shape)), torch.zeros(1, *shape))


def test_enough_iterations_make_all_singular_values_about_one() -> None:
    values = torch.linalg.svdvals(muon.orthogonalise(matrices((8, 8)), iterations=8))
    assert 0.5 < values.min() < values.max() < 1.5


def test_steps_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon.orthogonalise, "__kwdefaults__", {"iterations": 5})
    ours, theirs = parameters(), parameters()
    start = parameters()
    mine = muon.Muon(ours, lr=0.1, weight_decay=0.1, momentum=0.9)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            gradient = matrices(tuple(a.shape), seed=100 + step, number=1)[0]
            a.grad, b.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        moved = (b - before).abs().max()
        assert (a - b).abs().max() < 0.03 * moved  # torch computes in bfloat16


def test_a_parameter_without_a_gradient_stays() -> None:
    still, moved = parameters()[:2]
    before = still.detach().clone()
    moved.grad = torch.ones_like(moved)
    muon.Muon([still, moved], lr=0.1).step()
    assert torch.equal(still, before)
