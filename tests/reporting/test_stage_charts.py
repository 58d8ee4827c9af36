"""Test the charts of metrics whose names are not known before: the parts of PPO's reward."""

from tasks.reporting.stage_charts import draw_charts


def test_each_part_of_a_reward_has_a_curve() -> None:
    lines = [
        {"step": step, "reward": 1.0, "reward_model": 0.5 + step, "reward_too_long": -float(step)}
        for step in range(1, 4)
    ]
    charts = {chart.title: chart for chart in draw_charts("ppo", lines)}
    assert charts["Parts of the reward"].legend == [("model", "3.50"), ("too long", "−3.00")]
    assert charts["Reward"].legend == [("reward", "1.00")]


def test_without_parts_there_is_no_chart() -> None:
    charts = draw_charts("ppo", [{"step": step, "reward": 1.0} for step in (1, 2)])
    assert [chart.title for chart in charts] == ["Reward"]
