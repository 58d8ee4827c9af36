"""Test which judge decides, what is held against it, and the comparison of two policies of one run."""

from typing import Any

import pytest

from tasks.config.sections.gates import Gates, Promotion
from tasks.config.trusted_judges import choose_judge
from tasks.promotion.gate_results import Champion, Choice, Evidence, GateResult
from tasks.promotion.gates import choose, evaluate
from tests.tasks.promotion.finished_runs import interval

OFF = dict.fromkeys(Gates.model_fields)
# a language model that is no better than the longer answer, and a good reward model that PPO has never seen
DOUBTED: dict[str, Any] = {
    "lm_win_rate.ppo_vs_sft": interval(0.9, 0.88, 0.92),
    "lm_win_rate.dpo_vs_sft": interval(0.5, 0.4, 0.6),
    "held_out_win_rate.ppo_vs_sft": interval(0.6, 0.54, 0.66),
    "held_out_win_rate.dpo_vs_sft": interval(0.7, 0.64, 0.76),
    "judge.lm.agreement": interval(0.5, 0.45, 0.55),
    "judge.lm.longer_wins": interval(0.55, 0.5, 0.6),
    "judge.held_out.agreement": interval(0.8, 0.75, 0.85),
    "judge.held_out.longer_wins": interval(0.55, 0.5, 0.6),
    "reward.worst_attack": interval(0.9, 0.88, 0.92),
}


def judged(
    gate: str, choice: Choice, metrics: dict[str, Any], champion: Champion | None = None
) -> GateResult:
    """Return what one gate with its default says."""
    gates = Gates.model_validate(OFF | {gate: Gates.model_fields[gate].default})
    digests = {"ppo": "digest of ppo", "dpo": "digest of dpo"}
    (result,) = evaluate(gates, choice, Evidence(metrics, {}, None, 0.0, "digest of 9", digests), champion)
    return result


def test_a_judge_that_its_card_doubts_decides_only_if_there_is_no_other() -> None:
    found = choose(Promotion(), DOUBTED, ["ppo", "dpo"])
    assert found is not None
    assert found[:2] == ("dpo", "held_out")
    assert choose_judge(DOUBTED) == "held_out"  # what the end of the run and its pages show
    both = DOUBTED | {"judge.held_out.agreement": interval(0.5, 0.45, 0.55)}
    assert choose_judge(both) == "lm"


def test_a_judge_none_of_whose_verdicts_could_be_read_is_doubted() -> None:
    nothing = dict.fromkeys(("value", "low", "high"))
    assert choose_judge(DOUBTED | {"judge.lm.agreement": nothing | {"n": 0}}) == "held_out"
    assert choose_judge(DOUBTED | {"judge.lm.longer_wins": nothing | {"n": 0}}) == "held_out"
    assert choose_judge({"lm_win_rate.ppo_vs_sft": nothing}) == "lm"  # it has no report card


def test_a_refusal_names_the_judge_that_qualifies() -> None:
    result = judged("judge_agreement", Choice("ppo", "lm", None), DOUBTED)
    assert not result.passed
    assert result.sentence.endswith(" The held-out reward model qualifies: --set promotion.judge=held_out.")
    worse = DOUBTED | {"judge.held_out.agreement": interval(0.5, 0.45, 0.55)}
    assert "qualifies" not in judged("judge_agreement", Choice("ppo", "lm", None), worse).sentence


@pytest.mark.parametrize(
    ("policy", "judge", "passed"),
    [("dpo", "lm", True), ("dpo", "held_out", False), ("dpo", "reward", False), ("ppo", "lm", False)],
)
def test_an_attack_on_the_reward_model_counts_for_its_held_out_member(
    policy: str, judge: str, passed: bool
) -> None:
    result = judged("worst_attack", Choice(policy, judge, None), DOUBTED)
    assert result.passed is passed
    assert ("its held-out member, shares" in result.sentence) == (judge == "held_out")


CHAMPION = Champion("3", "digest of ppo")
CHALLENGER = Choice("dpo", "gold", None)


@pytest.mark.parametrize(
    ("metric", "rate"),
    [
        ("gold_win_rate.dpo_vs_ppo", interval(0.62, 0.55, 0.68)),
        ("gold_win_rate.ppo_vs_dpo", interval(0.38, 0.32, 0.45)),  # a pair is compared in one order alone
    ],
)
def test_the_other_policy_of_the_champions_run_is_compared_by_that_runs_own_figure(
    metric: str, rate: Any
) -> None:
    result = judged("win_rate_vs_champion", CHALLENGER, {metric: rate}, CHAMPION)
    assert (result.passed, result.figure) == (True, "62.0 % (55.0 to 68.0, n 500)")
    assert result.sentence == (
        "DPO wins 62.0 % against the champion (version 3), PPO of the same run, by the gold scorer: better."
    )


def test_a_figure_against_the_own_other_policy_is_none_against_another_champion() -> None:
    metrics = {"gold_win_rate.dpo_vs_ppo": interval(0.62, 0.55, 0.68)}
    for digest in ("digest of another", ""):
        result = judged("win_rate_vs_champion", CHALLENGER, metrics, Champion("3", digest))
        assert result.passed is None
        assert "has not compared DPO with the champion (version 3): run it again" in result.sentence
