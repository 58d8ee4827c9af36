"""Test when an independent score counts as fallen: prompt by prompt, and beside a reward that rises."""

import random

import pytest

from tasks.programs.ppo_stage.independent_score import Measurement
from tasks.programs.ppo_stage.plateau import describe_divergence, describe_fall, standard_errors, trend_errors


def measured(
    step: int, *, score: float, reward: float = 0.0, seed: int = 0, spread: float = 2.0
) -> Measurement:
    """Return a measurement of 64 prompts, which differ much more from each other than from themselves."""
    prompts = random.Random(0)
    noise = random.Random(100 * seed + step)
    levels = [prompts.gauss(0, spread) for _ in range(64)]
    return Measurement(
        step,
        [level + score + noise.gauss(0, 0.3) for level in levels],
        [level + reward + noise.gauss(0, 0.3) for level in levels],
        [1.0] * 64,
    )


def test_prompts_are_compared_with_themselves() -> None:
    best, now = measured(4, score=1.0), measured(8, score=0.7)
    assert best.score.low < now.score.value, "within the interval, which is over prompts"
    assert describe_fall(best, now).startswith("the independent score has fallen to ")
    assert describe_fall(best, now).endswith(" after step 4")
    assert describe_fall(best, measured(8, score=1.0)) == ""
    assert describe_fall(now, best) == "", "a rise is none"


def test_equal_measurements_are_no_fall_and_a_fall_of_all_prompts_alike_is() -> None:
    assert standard_errors([1.0] * 8, [1.0] * 8) == 0
    assert standard_errors([2.0] * 8, [1.0] * 8) == float("inf")


def test_a_reward_that_rises_while_the_score_falls() -> None:
    parting = [measured(step, score=-0.02 * step, reward=0.02 * step) for step in (0, 8, 16, 24)]
    assert "the reward has risen from" in describe_divergence(parting)
    assert describe_divergence(parting[1:]) == "", "too few measurements"
    both = [measured(step, score=-0.02 * step, reward=-0.02 * step) for step in (0, 8, 16, 24)]
    assert describe_divergence(both) == ""
    risen = [measured(step, score=0.02 * step, reward=0.02 * step) for step in (0, 8, 16, 24)]
    assert describe_divergence(risen) == ""


def test_a_trend_is_the_same_for_rising_and_falling_figures() -> None:
    values = [measured(step, score=0.02 * step).scores for step in (0, 8, 16, 24)]
    assert trend_errors(values) == pytest.approx(-trend_errors(values[::-1]))
    assert trend_errors(values) > 5
