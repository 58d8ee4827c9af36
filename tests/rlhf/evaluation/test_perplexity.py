"""Test perplexity, bits per byte, and their paired intervals."""

import math

import pytest
import torch

from tasks.rlhf.evaluation import perplexity


def test_a_text_counts_by_its_tokens() -> None:
    losses, tokens = torch.tensor([2.0, 10.0]), torch.tensor([1.0, 4.0])
    found = perplexity.perplexity(losses, tokens)
    assert found.value == pytest.approx(math.exp(12 / 5))
    assert found.n == 2
    assert (found.low, found.high) == (pytest.approx(math.exp(2)), pytest.approx(math.exp(2.5)))
    bits = perplexity.bits_per_byte(losses, torch.tensor([3.0, 13.0]))
    assert bits.value == pytest.approx(12 / 16 / math.log(2))


def test_a_uniform_model_over_256_bytes_has_8_bits_per_byte() -> None:
    num_bytes = torch.tensor([10.0, 3.0, 7.0])
    found = perplexity.bits_per_byte(num_bytes * math.log(256), num_bytes)
    assert found[:3] == pytest.approx((8, 8, 8))


def test_the_increase_is_paired() -> None:
    """Texts differ a lot, models by 1 % each: unpaired intervals overlap, the paired one is a point."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 50, (60,), generator=generator).double()
    theirs = tokens * (1 + 3 * torch.rand(60, generator=generator, dtype=torch.float64))
    ours = theirs + 0.01 * tokens
    alone = [perplexity.perplexity(losses, tokens) for losses in (ours, theirs)]
    assert alone[0].low < alone[1].high
    found = perplexity.perplexity_increase(ours, theirs, tokens)
    assert found[:3] == pytest.approx([100 * math.expm1(0.01)] * 3)
    assert perplexity.perplexity_increase(theirs, ours, tokens).value == pytest.approx(
        100 * math.expm1(-0.01)
    )


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """200 times 80 texts, whose losses per token have a known mean."""
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        tokens = torch.randint(5, 50, (80,), generator=generator).double()
        losses = tokens * (2 + torch.randn(80, generator=generator, dtype=torch.float64))
        found = perplexity.perplexity(losses, tokens)
        covered += found.low <= math.exp(2) <= found.high
    assert 180 <= covered <= 198  # 95 %: 190, with three standard deviations of 3


def test_one_text_has_no_interval() -> None:
    found = perplexity.perplexity(torch.tensor([2.0]), torch.tensor([2.0]))
    assert (found.value, found.low, found.high) == (pytest.approx(math.e), 0, math.inf)
