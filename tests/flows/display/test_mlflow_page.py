"""Test what MLflow's page of a run says first: headline, tags and description."""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows.display import mlflow_page
from tasks.config.pipeline import Pipeline
from tasks.tracking.client import Metric, Tracker
from tasks.tracking.tracked_run import TrackedRun

EVIL = "[x](https://evil.example) <img src=x onerror=alert(1)> **b** `c` | e"


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 500}


METRICS: dict[str, Any] = {
    "gold_win_rate.ppo_vs_sft": interval(0.75),
    "gold_win_rate.ppo_vs_base": interval(0.85),
    "reward_win_rate.ppo_vs_sft": interval(0.95),
    "judge.gold.agreement": interval(0.625),
    "reward.worst_attack": interval(0.25),
    "ppo.kl": interval(1.5),
    "dpo.kl": interval(0.5),
    "tax.perplexity.ppo_vs_sft": interval(9.0),
}
STAGE = {"name": "ppo", "key": "a" * 64, "warnings": [EVIL]}
SUMMARY: dict[str, Any] = {
    "profile": EVIL,
    "headline": "PPO 75 % against SFT: better",
    "gates": "PPO passes all gates.",
    "seconds": 1.0,
    "stages": [STAGE],
    "metrics": METRICS,
    "failed": {"dpo": f"dpo: {EVIL}"},
    "not_run": {},
}


def test_the_headline_is_of_the_judge_that_is_trusted_most() -> None:
    found = mlflow_page.headline_metrics(METRICS)
    assert {name: round(value, 3) for name, value in found.items()} == {
        "core/judge_agreement": 0.625,
        "core/worst_attack": 0.25,
        "core/ppo_win_rate": 0.75,
        "core/ppo_win_rate.low": 0.65,
        "core/ppo_win_rate.high": 0.85,
        "core/ppo_kl": 1.5,
        "core/ppo_perplexity_tax": 9.0,
        "core/dpo_kl": 0.5,
    }
    assert mlflow_page.headline_metrics({"data.pairs": 3}) == {}


def test_policies_have_figures_of_the_same_names() -> None:
    assert mlflow_page.policy_results(METRICS, "ppo") == {
        "eval/policy/win_rate_vs_sft": 0.75,
        "eval/policy/win_rate_vs_base": 0.85,
        "eval/policy/kl": 1.5,
        "eval/policy/perplexity_tax": 9.0,
    }
    assert mlflow_page.policy_results(METRICS, "dpo") == {"eval/policy/kl": 0.5}


def test_a_description_starts_with_the_result_and_shows_text_as_it_is() -> None:
    markdown = mlflow_page.describe_result(SUMMARY, "[Report](#/there)", {"Profile": EVIL})
    shown = MarkdownIt("gfm-like", {"linkify": False}).render(markdown)
    assert shown.startswith("<p><strong>PPO 75 % against SFT: better. PPO passes all gates.</strong>")
    assert shown.count("<a ") == 1
    assert shown.count("<img") == 0
    assert "<td>0.750 (0.650 to 0.850)</td>" in shown
    assert "at equal length" not in shown  # no figure, no column
    assert shown.count("&lt;img src=x onerror=alert(1)&gt;") == 3  # a failure, a warning, the profile


def test_a_run_that_compared_nothing_says_so() -> None:
    nothing = {"headline": "", "gates": "", "metrics": {"data.pairs": 3}, "failed": {}, "stages": []}
    summary = SUMMARY | nothing
    assert mlflow_page.describe_result(summary, "", {}).startswith("**No policies were compared.**")


@pytest.mark.parametrize("is_on", [True, False])
def test_the_headline_is_logged_before_all_other_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    logged: list[list[str]] = []
    tags: dict[str, str] = {}

    def log(self: Tracker, run_id: str, metrics: list[Metric], **_: Any) -> None:
        logged.append([name for name, *_ in metrics])

    monkeypatch.setattr(Tracker, "log_metrics", log)
    monkeypatch.setattr(Tracker, "search", lambda *_: [])
    monkeypatch.setattr(Tracker, "set_tags", lambda self, run_id, found: tags.update(found))
    monkeypatch.setattr(Tracker, "is_up", is_on)
    tracked = TrackedRun(Tracker(tmp_path, "http://mlflow:5000"), "m")
    mlflow_page.show_result(SUMMARY, Pipeline(seed=7), tracked, {"Report": "report.html"})
    if not is_on:
        assert (logged, tags) == ([], {})
        return
    headline, others = logged
    assert {name.split("/")[0] for name in headline} == {"core"}
    assert {"eval/win_rate/gold/ppo_vs_sft", "intervals/eval/kl/ppo.low", "system/seconds"} <= set(others)
    assert (tags["judge"], tags["result"]) == ("gold", SUMMARY["headline"])
    assert "/runs/m/artifacts/report.html" in tags["mlflow.note.content"]
    assert "- Seed: `7`" in tags["mlflow.note.content"]
