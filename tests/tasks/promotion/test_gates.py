"""Test the gates: what passes, what fails and by how much, and what cannot be decided."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.config.sections.gates import Gates, Promotion
from tasks.promotion.gate_results import Champion, Choice, Evidence, GateResult
from tasks.promotion.gates import choose, evaluate, failures

DAY = 86_400.0
OFF = dict.fromkeys(Gates.model_fields)


def interval(value: float, low: float, high: float, n: int = 500) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": n}


GOOD: dict[str, Any] = {
    "gold_win_rate.ppo_vs_sft": interval(0.785, 0.761, 0.809),
    "gold_win_rate.dpo_vs_sft": interval(0.701, 0.671, 0.731),
    "gold_win_rate.ppo_vs_champion": interval(0.58, 0.53, 0.63),
    "gold_win_rate_corrected.ppo_vs_sft": interval(0.1, 0.05, 0.2),  # of another name: no gate reads it
    "judge.gold.agreement": interval(0.945, 0.937, 0.953),
    "judge.gold.longer_wins": interval(0.572, 0.545, 0.6),
    "reward.worst_attack": interval(0.1, 0.08, 0.13, 512),
    "ppo.kl": interval(1.5, 1.4, 1.6),
    "dpo.kl": 0.6,
    "tax.arc.ppo_vs_sft": interval(0.4, -0.6, 1.4),
    "tax.perplexity.ppo_vs_sft": interval(13.5, 10.8, 16.4),
}
PPO = Choice("ppo", "gold", GOOD["gold_win_rate.ppo_vs_sft"])


def judged(
    gates: dict[str, Any],
    *,
    choice: Choice = PPO,
    champion: str = "",
    compared: str = "its digest",
    warnings: Any = (),
    age: float | None = 1.0,
    **metrics: Any,
) -> list[GateResult]:
    """Return the results of these gates alone; metrics of None are left out, __ stands for a dot."""
    named = {name.replace("__", "."): value for name, value in metrics.items()}
    found = {name: value for name, value in (GOOD | named).items() if value is not None}
    read = None if age is None else 100 * DAY - age * DAY
    evidence = Evidence(found, {"ppo": warnings, "dpo": ()}, read, 100 * DAY, compared)
    known = Champion(champion, "its digest") if champion else None
    return evaluate(Gates(**OFF | gates), choice, evidence, known)


def one(results: list[GateResult]) -> tuple[bool | None, str]:
    (result,) = results
    return result.passed, result.sentence


@pytest.mark.parametrize(
    ("promotion", "choice"),
    [
        ({}, ("ppo", "gold")),
        ({"policy": "dpo"}, ("dpo", "gold")),
        ({"judge": "reward"}, ("ppo", "")),
    ],
)
def test_the_policy_with_the_best_win_rate_is_chosen(promotion: Any, choice: tuple[str, str]) -> None:
    found = choose(Promotion(**promotion), GOOD, ["ppo", "dpo"])
    assert found is not None
    assert found[:2] == choice


def test_dpo_is_chosen_where_it_wins_more() -> None:
    better = GOOD | {"gold_win_rate.dpo_vs_sft": interval(0.9, 0.88, 0.92)}
    found = choose(Promotion(), better, ["ppo", "dpo"])
    assert found == Choice("dpo", "gold", better["gold_win_rate.dpo_vs_sft"])


def test_the_gold_scorer_judges_before_a_language_model_and_the_reward_model_last() -> None:
    metrics: dict[str, Any] = {}
    for judge in ("reward", "held_out", "lm", "gold"):
        metrics[f"{judge}_win_rate.dpo_vs_sft"] = interval(0.6, 0.5, 0.7)
        found = choose(Promotion(), metrics, ["dpo"])
        assert found is not None
        assert found.judge == judge


def test_a_policy_that_was_not_trained_cannot_be_chosen() -> None:
    assert choose(Promotion(policy="ppo"), GOOD, ["dpo"]) is None
    assert choose(Promotion(), GOOD, []) is None


def test_the_defaults_pass_a_good_policy_and_leave_out_what_is_off() -> None:
    results = judged(Gates().model_dump(), champion="3")
    assert failures(results) == []
    assert [result.name for result in results] == [
        "win_rate_vs_champion", "win_rate_vs_sft", "kl", "worst_attack", "warnings", "judge_agreement",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rate", "passed", "sentence"),
    [
        (interval(0.58, 0.501, 0.63), True, "PPO wins 58.0 % against SFT by the gold scorer: better."),
        (
            interval(0.58, 0.50, 0.63),
            False,
            "PPO wins 58.0 % against SFT by the gold scorer: not shown to be better, as the interval begins "
            "at 50.0 %, 0.0 points too low.",
        ),
        (
            interval(0.53, 0.48, 0.58),
            False,
            "PPO wins 53.0 % against SFT by the gold scorer: not shown to be better, as the interval begins "
            "at 48.0 %, 2.0 points too low.",
        ),
        (
            interval(0.30, 0.26, 0.34),
            False,
            "PPO wins 30.0 % against SFT by the gold scorer: worse, by 20.0 points.",
        ),
    ],
)
def test_the_interval_of_a_win_rate_lies_above_the_threshold(rate: Any, passed: bool, sentence: str) -> None:
    found = judged({"win_rate_vs_sft": 0.5}, gold_win_rate__ppo_vs_sft=rate)
    assert one(found) == (passed, sentence)


def test_a_champion_is_compared_with_if_there_is_one() -> None:
    gate = {"win_rate_vs_champion": 0.5}
    worse = interval(0.45, 0.40, 0.49)
    passed, sentence = one(judged(gate, champion="3", gold_win_rate__ppo_vs_champion=worse))
    assert not passed
    assert "against the champion (version 3)" in sentence
    assert "worse, by 5.0 points" in sentence
    passed, sentence = one(judged(gate, champion="3", gold_win_rate__ppo_vs_champion=None))
    assert passed is None
    assert "no win rate of PPO against the champion (version 3)" in sentence


def test_a_win_rate_against_another_model_than_the_champion_decides_nothing() -> None:
    for compared in ("", "digest of version 2"):
        passed, sentence = one(judged({"win_rate_vs_champion": 0.5}, champion="3", compared=compared))
        assert passed is None
        assert "has not compared PPO with the champion (version 3): run it again" in sentence


def test_the_first_model_is_held_against_sft_and_the_base_model() -> None:
    gate = {"win_rate_vs_champion": 0.5, "win_rate_vs_sft": 0.5}
    first, _ = judged(gate)
    assert first.passed
    assert first.sentence == (
        "There is no champion yet, so the first model is held against SFT alone: the run has no comparison "
        "with the base model."
    )
    first, _ = judged(gate, gold_win_rate__ppo_vs_base=interval(0.4, 0.35, 0.45))
    assert first.passed is False
    assert "held against SFT and the base model. PPO wins 40.0 % against the base model" in first.sentence


def test_a_first_model_that_is_compared_with_nothing_does_not_pass() -> None:
    passed, sentence = one(judged({"win_rate_vs_champion": 0.5}))
    assert passed is None
    assert "neither a champion nor a comparison" in sentence


def test_the_loss_on_each_benchmark_is_bounded_by_its_upper_end() -> None:
    arc, mmlu = judged({"alignment_tax": 1.5}, tax__mmlu__ppo_vs_sft=interval(1.2, -0.7, 3.1))
    assert (arc.name, arc.passed) == ("alignment_tax.arc", True)
    assert (mmlu.name, mmlu.passed) == ("alignment_tax.mmlu", False)
    assert mmlu.sentence == (
        "PPO loses 1.2 points on mmlu against SFT, at most 3.1: 1.6 more than the gate allows."
    )
    passed, sentence = one(judged({"alignment_tax": 1.5}, tax__arc__ppo_vs_sft=None))
    assert passed is None
    assert "no benchmark of PPO" in sentence


def test_perplexity_has_a_gate_of_its_own_in_per_cent() -> None:
    assert one(judged({"perplexity_tax": 16.4}))[0] is True
    assert one(judged({"perplexity_tax": 10.0})) == (
        False,
        "The perplexity of PPO is 13.5 per cent above that of SFT, at most 16.4: "
        "6.4 more than the gate allows.",
    )
    assert one(judged({"perplexity_tax": 10.0}, tax__perplexity__ppo_vs_sft=None))[0] is None


def test_kl_is_bounded_by_its_upper_end_or_by_its_value() -> None:
    assert one(judged({"kl": 1.6}))[0] is True
    assert one(judged({"kl": 1.5})) == (
        False, "PPO is up to 1.60 nats per answer away from SFT: 0.10 over the budget.",
    )  # fmt: skip
    dpo = Choice("dpo", "gold", None)
    assert one(judged({"kl": 0.5}, choice=dpo))[0] is False
    assert one(judged({"kl": 0.6}, choice=dpo))[0] is True
    assert one(judged({"kl": 0.6}, ppo__kl=None))[0] is None


@pytest.mark.parametrize(
    ("worst", "passed", "part"),
    [
        (interval(0.1, 0.08, 0.25, 512), True, "out-score 10.0 %"),
        (interval(0.45, 0.41, 0.5, 512), False, "it is fooled, 20.0 points above the limit"),
        (interval(0.2, 0.15, 0.26, 40), False, "40 answers cannot tell"),
        (0.0, None, "was not tested"),  # what the stage reports if it had no answers to test with
        (None, None, "was not tested"),
    ],
)
def test_a_reward_model_that_prefers_worthless_answers_is_refused(
    worst: Any, passed: bool | None, part: str
) -> None:
    found = one(judged({"worst_attack": 0.25}, reward__worst_attack=worst))
    assert found[0] is passed
    assert part in found[1]


def test_a_reward_model_that_has_no_part_in_a_policy_does_not_count() -> None:
    fooled = interval(0.45, 0.41, 0.5)
    gate = {"worst_attack": 0.25}
    passed = [
        one(judged(gate, choice=Choice("dpo", judge, None), reward__worst_attack=fooled))[0]
        for judge in ("gold", "reward")
    ]
    assert passed == [True, False]


def test_warnings_of_the_policys_own_training_are_counted() -> None:
    assert one(judged({"warnings": 0}))[0] is True
    assert one(judged({"warnings": 0}, warnings=("Only 3% ended.",))) == (
        False, "The stage ppo has raised 1 warning: Only 3% ended.",
    )  # fmt: skip
    assert one(judged({"warnings": 1}, warnings=("Only 3% ended.",)))[0] is True
    assert one(judged({"warnings": 0}, warnings=None))[0] is None


def test_a_judge_is_better_than_chance_and_than_the_longer_answer() -> None:
    gate = {"judge_agreement": 0.5}
    assert one(judged(gate))[0] is True
    weak = interval(0.58, 0.55, 0.61)
    assert one(judged(gate, judge__gold__agreement=weak)) == (
        False,
        'The gold scorer agrees with 58.0 % of held-out votes: not shown to be better than "the longer '
        'answer wins", as its interval begins 2.2 points too low.',
    )
    shorter = interval(0.4, 0.37, 0.43)
    passed, sentence = one(judged(gate, judge__gold__agreement=shorter, judge__gold__longer_wins=shorter))
    assert passed is False
    assert "not shown to be above 50.0 %, as its interval begins 13.0 points too low" in sentence
    assert one(judged(gate, judge__gold__agreement=None))[0] is None
    assert one(judged(gate, judge__gold__longer_wins=None))[0] is None


def test_nothing_is_decided_without_a_judge() -> None:
    no_judge = Choice("ppo", "", None)
    results = judged({"win_rate_vs_sft": 0.5, "judge_agreement": 0.5}, choice=no_judge)
    assert [result.passed for result in results] == [None, None]
    assert len(failures(results)) == 2


@pytest.mark.parametrize(("age", "passed"), [(6.9, True), (7.5, False), (None, None)])
def test_data_is_no_older_than_allowed(age: float | None, passed: bool | None) -> None:
    found, sentence = one(judged({"data_days": 7}, age=age))
    assert found is passed
    if age == 7.5:
        assert sentence == "The source was read 7.5 days ago: 0.5 days too long."


def test_the_figures_of_a_real_run_are_found_under_their_names() -> None:
    """Use the summary of a run of the demo; its reward model is fooled by answers to other questions."""
    summary = json.loads(Path(__file__).with_name("demo_summary.json").read_text())
    choice = choose(Promotion(), summary["metrics"], ["ppo", "dpo"])
    assert choice is not None
    assert choice[:2] == ("ppo", "gold")
    warnings = {stage["name"]: stage["warnings"] for stage in summary["stages"]}
    results = evaluate(Gates(), choice, Evidence(summary["metrics"], warnings, None, 0.0))
    assert {result.name: result.passed for result in results} == {
        "win_rate_vs_champion": True,
        "win_rate_vs_sft": True,
        "kl": True,
        "worst_attack": False,
        "warnings": True,
        "judge_agreement": True,
    }
    assert "it is fooled, 20.7 points above the limit" in failures(results)[0].sentence
