"""Test best-of-n against its KL's golden values and against all choices of n answers."""

from itertools import combinations

import pytest
import torch

from tasks.rlhf.algorithms.best_of_n import best_of_n, best_of_n_kl, powers_of_two


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_the_kl_is_known(n: int, kl: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_the_estimate_is_the_mean_over_all_choices_of_n_answers(n: int) -> None:
    torch.manual_seed(0)
    rewards, scores = torch.randn(3, 6), torch.randn(3, 6)
    wanted = [
        torch.stack(
            [s[max(chosen, key=lambda i: r[i].item())] for chosen in combinations(range(6), n)]
        ).mean()
        for r, s in zip(rewards, scores, strict=True)
    ]
    assert torch.allclose(best_of_n(rewards, scores, n).float(), torch.stack(wanted), atol=1e-6)


def test_the_numbers_of_answers() -> None:
    assert powers_of_two(16) == [1, 2, 4, 8, 16]
    assert powers_of_two(20) == [1, 2, 4, 8, 16]
