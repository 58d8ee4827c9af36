"""Test that figures far outside their recent range are found, and ordinary ones are not."""

import math
import random

import pytest

from tasks.programs.ppo_stage.spikes import LEAST, WINDOW, Ranges, describe_spike, remember

LIMIT = 8.0


def usual(rng: random.Random) -> dict[str, float]:
    """Return figures like those of a healthy step: some vary by orders of magnitude."""
    return {
        "reward": rng.gauss(0.5, 0.1),
        "policy_loss": rng.gauss(0, 0.004),
        "value_loss": 0.1 * math.exp(rng.gauss(0, 0.3)),
        "gradient_norm": 0.4 * math.exp(rng.gauss(0, 0.3)),
        "approx_kl": 1e-3 * math.exp(rng.gauss(0, 1.2)),
    }


def seen(steps: int, seed: int = 0) -> Ranges:
    rng = random.Random(seed)
    ranges: Ranges = {}
    for _ in range(steps):
        ranges = remember(ranges, usual(rng))
    return ranges


@pytest.mark.parametrize(
    ("name", "value", "label"),
    [
        ("gradient_norm", 40.0, "the gradient norm was 40 against a median of 0."),
        ("policy_loss", 1.0, "the policy loss was 1"),
        ("value_loss", 30.0, "the value loss was 30"),
        ("approx_kl", 1e3, "the size of an update was 1e"),
        ("reward", 5.0, "the reward was 5"),
        ("reward", -5.0, "the reward was -5"),
    ],
)
def test_a_planted_spike_is_named(name: str, value: float, label: str) -> None:
    figures = usual(random.Random(1)) | {name: value}
    assert describe_spike(seen(20), figures, LIMIT).startswith(label)
    assert describe_spike(seen(LEAST - 1), figures, LIMIT) == "", "too few batches to know a range"


def test_a_spike_stays_one_while_the_range_holds_a_few() -> None:
    ranges = seen(20)
    for _ in range(3):
        spike = usual(random.Random(2)) | {"gradient_norm": 40.0}
        assert describe_spike(ranges, spike, LIMIT)
        ranges = remember(ranges, spike)
    assert all(len(values) == WINDOW for values in ranges.values())


def test_healthy_steps_ring_rarely() -> None:
    rng, found = random.Random(3), 0
    ranges: Ranges = {}
    for _ in range(2000):
        figures = usual(rng)
        found += bool(describe_spike(ranges, figures, LIMIT))
        ranges = remember(ranges, figures)
    assert found <= 2


def test_a_fall_is_no_spike_and_a_missing_figure_keeps_its_range() -> None:
    ranges = seen(20)
    lower = {"gradient_norm": 1e-6, "approx_kl": 0.0, "value_loss": 1e-9, "policy_loss": -1.0}
    assert describe_spike(ranges, lower, LIMIT) == ""
    assert remember(ranges, {"reward": 0.5})["gradient_norm"] == ranges["gradient_norm"]
