"""Draw over-optimisation: reward and independent score of the policy against its distance from the SFT model.

Gao et al. 2022 draw both against the square root of the KL, beside best-of-n sampling of the SFT model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.reporting.charts import Curve, Mark, draw_curves
from tasks.reporting.numbers import format_number
from tasks.reporting.stage_charts import Chart

SCORES = {"held_out": "Held-out reward", "gold": "Gold score", "judge": "Judge's preference"}
MEANINGS = {
    "held_out": "The same answers by the member of the reward model that PPO never sees, in the same unit.",
    "gold": "The same answers by the gold scorer; 10 points are a perfect answer.",
    "judge": "How often a language model prefers the same answers to the SFT model's own (a tie: 1/2).",
}
ACROSS = "Across: the square root of the KL in nats an answer."
ACTIONS = {
    "warn": "went on",
    "raise_kl": "raised the KL penalty",
    "roll_back": "rolled back",
    "stop": "stopped",
}


def draw_over_optimisation(scores: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of reward and score, of what PPO's guards measured; none without measurements."""
    if not scores.get("points"):
        return []
    by = scores["by"]
    reward_note = "The policy on prompts that it does not learn from, and the SFT model with its best of n"
    return [
        _draw(
            "Reward against KL",
            f"{reward_note} answers by reward, n = 1, 2, 4, ... {ACROSS}",
            scores,
            "score_reward",
            "reward",
        ),
        _draw(
            f"{SCORES[by]} against KL",
            f"{MEANINGS[by]} If it falls while the reward rises, the policy exploits the reward model.",
            scores,
            "independent_score",
            "independent_score",
        ),
    ]


def _draw(title: str, note: str, scores: Mapping[str, Any], name: str, name_of_best: str) -> Chart:
    points: Sequence[Mapping[str, float]] = scores["points"]
    curves = [Curve("policy", [(_root(one["score_kl"]), one[name]) for one in points], sparse=True)]
    measured = [one for one in scores["best_of_n"] if name_of_best in one]  # a judge sees few of them
    if best_of := [(_root(one["kl"]), one[name_of_best]) for one in measured]:
        curves.append(Curve("best of n", best_of, sparse=True))
    mark = _mark_best(scores, name)
    drawing = draw_curves(curves, title=f"ppo: {title}", mark=mark, only_whole_ticks=False)
    legend = [(curve.label, format_number(curve.points[-1][1])) for curve in curves]
    return Chart(title, note, legend, drawing)


def _mark_best(scores: Mapping[str, Any], name: str) -> Mark | None:
    """Return the measurement with the best independent score."""
    step = scores["best_step"]
    found = next((one for one in scores["points"] if one["step"] == step), None)
    if found is None or name != "independent_score":
        return None
    x, y = _root(found["score_kl"]), found[name]
    return Mark(x, y, f"best: {format_number(y)} after step {step:,}")


def _root(kl: float) -> float:
    return math.sqrt(max(0.0, kl))


def describe_decisions(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the guards saw and did, as (step, sentence)."""
    return [
        (f"guards, step {alarm['step']}", f"{ACTIONS[alarm['action']]}: {alarm['reason']}")
        for alarm in scores.get("alarms", ())
    ]
