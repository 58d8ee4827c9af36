"""Learning rates and data orders as functions of the step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tasks.rlhf.algorithms.schedules import batch_indices, learning_rate, num_steps
from tasks.rlhf.compute.seeds import mix


def test_linear_rate_by_hand() -> None:
    rates = [learning_rate(step, peak=1.0, total=6, warmup=2, shape="linear") for step in range(7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_cosine_rate_by_hand() -> None:
    rates = [learning_rate(step, peak=2.0, total=4, warmup=0, shape="cosine") for step in range(5)]
    assert rates == pytest.approx([2.0, 1.707107, 1.0, 0.292893, 0.0], abs=1e-6)


@given(st.integers(1, 50), st.data())
def test_every_step_of_a_run_has_a_rate_between_zero_and_the_peak(total: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(0, total))
    for shape in ("linear", "cosine"):
        rates = [
            learning_rate(step, peak=1e-3, total=total, warmup=warmup, shape=shape) for step in range(total)
        ]
        assert all(0 < rate <= 1e-3 for rate in rates)
        assert max(rates) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "most", "expected"),
    [
        (100, 8, 1.0, None, 13),
        (100, 10, 2.0, None, 20),
        (100, 10, 2.0, 5, 5),
        (3, 8, 0.1, None, 1),
        (100, 10, 0.25, None, 3),
    ],
)
def test_number_of_steps(rows: int, batch: int, epochs: float, most: int | None, expected: int) -> None:
    assert num_steps(rows, batch_size=batch, epochs=epochs, max_steps=most) == expected


@given(st.integers(1, 17), st.integers(1, 20), st.integers(0, 5))
def test_passes_follow_one_another_without_gap_or_repeat(num_rows: int, batch_size: int, seed: int) -> None:
    batches = [
        batch_indices(step, num_rows=num_rows, batch_size=batch_size, seed=seed)
        for step in range(3 * num_rows)
    ]
    assert all(len(batch) == batch_size for batch in batches)
    drawn = [index for batch in batches for index in batch]
    for start in range(0, len(drawn) - num_rows + 1, num_rows):
        assert sorted(drawn[start : start + num_rows]) == list(range(num_rows))


def test_order_is_fresh_in_every_pass_and_for_every_seed() -> None:
    passes = [
        tuple(batch_indices(step, num_rows=50, batch_size=50, seed=seed))
        for step in range(4)
        for seed in range(4)
    ]
    assert len(set(passes)) == 16


def test_order_depends_on_the_step_alone() -> None:
    torch.manual_seed(1)
    first = batch_indices(7, num_rows=20, batch_size=6, seed=3)
    torch.manual_seed(2)
    assert batch_indices(7, num_rows=20, batch_size=6, seed=3) == first


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4))
def test_mixed_seeds_suit_every_generator(numbers: list[int]) -> None:
    assert 0 <= mix(*numbers) < 2**63
    assert mix(*numbers) == mix(*numbers)


def test_neighbouring_seeds_and_steps_share_nothing() -> None:
    seeds = {mix(seed, step) for seed in range(100) for step in range(100)}
    assert len(seeds) == 10_000
    ones = sum(mix(0, step).bit_count() for step in range(1000)) / 1000
    assert 30.5 < ones < 32.5  # of 63 bits
