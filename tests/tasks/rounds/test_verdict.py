"""Test which rounds have won, whether the loop goes on, and which round is the best."""

from typing import Any

import pytest

from tasks.rounds.verdict import RoundVerdict, best_round, goes_on, judge_round


def rate(low: float, high: float) -> dict[str, float]:
    return {"value": (low + high) / 2, "low": low, "high": high, "n": 300}


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.51, 0.6, "won"), (0.5, 0.6, "undecided"), (0.4, 0.5, "undecided"), (0.3, 0.49, "lost")],
)
def test_the_whole_interval_decides(low: float, high: float, outcome: str) -> None:
    verdict = judge_round({"gold_win_rate.ppo_vs_predecessor": rate(low, high)}, number=2, standing=1)
    assert (verdict.outcome, verdict.judge, verdict.against) == (outcome, "gold", "predecessor")
    assert verdict.sentence.startswith(f"{outcome}: {50 * (low + high):.1f} % (")
    assert verdict.sentence.endswith("against the last round, by the gold scorer")


def test_the_first_policy_is_compared_with_sft() -> None:
    metrics = {"gold_win_rate.ppo_vs_predecessor": rate(0.1, 0.2), "gold_win_rate.ppo_vs_sft": rate(0.6, 0.7)}
    assert judge_round(metrics, number=1, standing=None).outcome == "won"
    assert judge_round(metrics, number=2, standing=1).outcome == "lost"


def test_the_judge_that_is_trusted_most_decides() -> None:
    metrics = {
        "reward_win_rate.ppo_vs_predecessor": rate(0.6, 0.7),
        "held_out_win_rate.ppo_vs_predecessor": rate(0.4, 0.6),
    }
    verdict = judge_round(metrics, number=2, standing=1)
    assert (verdict.outcome, verdict.judge) == ("undecided", "held_out")


@pytest.mark.parametrize("metrics", [{}, {"gold_win_rate.ppo_vs_predecessor": {"value": 0.6, "low": None}}])
def test_without_a_rate_nothing_is_decided(metrics: dict[str, Any]) -> None:
    verdict = judge_round(metrics, number=2, standing=1)
    assert (verdict.outcome, verdict.rate) == ("undecided", None)
    assert verdict.sentence == "undecided: nothing compared it with the last round"


def test_a_round_that_is_not_the_one_before_is_named() -> None:
    metrics = {"gold_win_rate.ppo_vs_predecessor": rate(0.6, 0.7)}
    assert judge_round(metrics, number=4, standing=1).sentence.endswith("against round 1, by the gold scorer")
    sentence = judge_round({}, number=4, standing=1).sentence
    assert sentence == "undecided: nothing compared it with round 1"


def of(outcome: Any) -> RoundVerdict:
    return RoundVerdict(outcome, "predecessor", "gold", None, "")


@pytest.mark.parametrize(
    ("stop", "followed"),
    [("not_won", ["won"]), ("lost", ["won", "undecided"]), ("never", ["won", "undecided", "lost"])],
)
def test_which_verdicts_another_round_follows(stop: Any, followed: list[str]) -> None:
    assert [one for one in ("won", "undecided", "lost") if goes_on(of(one), stop)] == followed


@pytest.mark.parametrize(
    ("start", "outcomes", "best"),
    [
        (True, ["won", "won", "won", "undecided"], 2),
        (True, ["undecided", "won", "lost", "undecided"], 1),
        (True, ["won", "undecided"], 0),  # votes are better than nothing; the gates decide
        (True, ["lost"], 0),
        (False, ["undecided", "lost"], None),
        (False, ["undecided", "won"], 1),
    ],
)
def test_the_best_is_the_last_that_won(start: bool, outcomes: list[str], best: int | None) -> None:
    verdicts = {number: of(outcome) for number, outcome in enumerate(outcomes) if number}
    assert best_round(verdicts, starts_with_policy=start) == best
