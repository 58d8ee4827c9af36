"""Test the picture of over-optimisation: what is drawn, where, and what the guards' decisions say."""

import re
from typing import Any

from tasks.reporting.evaluation.over_optimisation import describe_decisions, draw_over_optimisation


def point(step: int, kl: float, reward: float, score: float) -> dict[str, float]:
    return {"step": step, "score_kl": kl, "score_reward": reward, "independent_score": score}


SCORES: dict[str, Any] = {
    "by": "gold",
    "points": [point(0, -0.01, 0.0, 6.0), point(4, 1.0, 0.5, 8.0), point(8, 4.0, 0.9, 5.0)],
    "best_of_n": [
        {"n": 1, "kl": 0.0, "reward": 0.0, "independent_score": 6.0},
        {"n": 2, "kl": 0.25, "reward": 0.4, "independent_score": 7.0},
    ],
    "best_step": 4,
    "kept_step": 4,
    "alarms": [{"step": 8, "reason": "the independent score has fallen", "action": "roll_back"}],
}


def circles(drawing: str) -> list[tuple[float, float]]:
    """Return the coordinates of the points."""
    return [(float(x), float(y)) for x, y in re.findall(r'<circle class="s0" cx="(.*?)" cy="(.*?)"', drawing)]


def test_reward_and_score_are_drawn_against_the_root_of_the_kl() -> None:
    reward, score = draw_over_optimisation(SCORES)
    assert (reward.title, score.title) == ("Reward against KL", "Gold score against KL")
    assert reward.legend == [("policy", "0.900"), ("best of n", "0.400")]
    assert score.legend == [("policy", "5.00"), ("best of n", "7.00")]
    (first, _), (second, high), (third, low) = circles(score.drawing)
    assert third - second == second - first > 0, "roots of 0, 1 and 4; a negative estimate is 0"
    assert high < low, "the score falls at the end"
    assert "best: 8.00 after step 4" in score.drawing
    assert "best:" not in reward.drawing
    assert ">0.5<" in score.drawing, "the axis has fractions"


def test_without_measurements_nothing_is_drawn() -> None:
    assert draw_over_optimisation({}) == []
    assert draw_over_optimisation({"alarms": SCORES["alarms"]}) == []
    (_, score) = draw_over_optimisation(SCORES | {"best_of_n": []})
    assert [label for label, _ in score.legend] == ["policy"]


def test_decisions_are_sentences() -> None:
    assert describe_decisions(SCORES) == [("guards, step 8", "rolled back: the independent score has fallen")]
    assert describe_decisions({}) == []
