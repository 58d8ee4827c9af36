"""Test the names of metrics in MLflow: the demo's real ones, and that no two names meet in one."""

import itertools
import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric

from tasks.tracking import metric_names
from tasks.tracking.metric_names import curve_name, final_metrics, final_name

DEMO = json.loads(Path(__file__).with_name("demo_metric_names.json").read_text())
WORDS = ("", "data", "site", "gold", "reward", "ppo", "judge", "tax", "kl", "n", "low", "cut", "progress")
WORDS += ("gold_win_rate", "gold_win_rate_corrected", "win_rate", "report", "seconds", "prompts_cut", "a/b")
WORDS += ("reward_accuracy", "reward_model", "unparseable", "eval", "other", "kl_score")


def as_figure(name: str) -> dict[str, object]:
    return {name: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9} if name in DEMO["intervals"] else 0.5}


def test_every_metric_of_the_demo_has_its_group() -> None:
    groups = {"eval", "data", "system"}
    for name in DEMO["final"]:
        assert final_name(name).split("/")[0] in groups, name
    for stage, names in DEMO["curves"].items():
        trains = stage in metric_names.TRAINING_STAGES
        for name in names:
            assert curve_name(stage, name).startswith(f"train/{stage}/") is trains, name


def test_the_demos_names_stay_apart_and_are_taken_by_mlflow() -> None:
    expected = sum(4 if name in DEMO["intervals"] else 1 for name in DEMO["final"])
    named: list[str] = []
    for name in DEMO["final"]:
        named += final_metrics(as_figure(name))
    named += [curve_name(stage, name) for stage, names in DEMO["curves"].items() for name in names]
    assert len(named) == expected + sum(map(len, DEMO["curves"].values()))
    assert len(set(named)) == len(named)
    for one in named:
        _validate_metric(one, 0.5, 1, 1)


def test_names_that_users_look_for() -> None:
    assert {name: final_name(name) for name in EXPECTED} == EXPECTED


EXPECTED = {
    "gold_win_rate.ppo_vs_sft": "eval/win_rate/gold/ppo_vs_sft",
    "lm_win_rate_at_equal_length.dpo_vs_base": "eval/win_rate_at_equal_length/lm/dpo_vs_base",
    "reward_win_rate_corrected.dpo_vs_sft": "eval/win_rate_corrected/reward/dpo_vs_sft",
    "judge.gold.agreement": "eval/judge/gold/agreement",
    "reward.flipped": "eval/verdicts/reward/flipped",
    "perplexity.ppo": "eval/perplexity/ppo",
    "tax.perplexity.ppo_vs_sft": "eval/tax/perplexity/ppo_vs_sft",
    "benchmark.arc.5shot.ppo": "eval/benchmark/arc/5shot/ppo",
    "ppo.kl": "eval/kl/ppo",
    "ppo.rollout_kl": "eval/ppo/rollout_kl",
    "sft.held_out_loss": "eval/sft/held_out_loss",
    "sft.prompts_cut": "data/cut/sft/prompts_cut",
    "reward.worst_attack": "eval/reward_model/worst_attack",
    "reward_accuracy.votes": "eval/reward_accuracy/votes",
    "data.pairs": "data/pairs",
    "site.posts": "data/site/posts",
    "seconds": "system/seconds",
    "a.new.figure": "other/a/new/figure",
}


def test_an_interval_lies_apart_and_text_is_left_out() -> None:
    metrics = {"ppo.kl": {"value": 1, "low": 0.5, "high": None, "n": 7}, "x": "text", "seconds": 3}
    assert final_metrics(metrics) == {
        "eval/kl/ppo": 1.0,
        "intervals/eval/kl/ppo.low": 0.5,
        "intervals/eval/kl/ppo.n": 7.0,
        "system/seconds": 3.0,
    }


def test_no_two_names_of_up_to_three_parts_meet() -> None:
    names = [".".join(parts) for count in range(1, 4) for parts in itertools.product(WORDS, repeat=count)]
    seen = {final_name(name) for name in names}
    assert len(seen) == len(set(names))
    curves = {
        curve_name(stage, name)
        for stage in ("sft", "data", "site", "answers", "a/b")
        for name in names[: len(WORDS) + len(WORDS) ** 2]
    }
    assert len(curves) == 5 * (len(WORDS) + len(WORDS) ** 2)
    assert not curves & seen


@settings(deadline=None)
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_name_is_taken_and_stays_apart(one: str, other: str) -> None:
    for name in (final_name(one), curve_name("sft", one), curve_name(one, "loss")):
        _validate_metric(name, 0.5, 1, 1)
    for names in (final_name, lambda name: curve_name("sft", name), lambda name: curve_name(name, "loss")):
        assert (names(one) == names(other)) is (one == other)
