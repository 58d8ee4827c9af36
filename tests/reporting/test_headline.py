"""Test the sentence that a report begins with: no rate of a doubted judge stands in it without the doubt."""

from typing import Any

import pytest
from markupsafe import Markup

from tasks.reporting.evaluation.headline import as_json, choose_headline, describe_doubt
from tasks.reporting.evaluation.judges import Judge


def rate(value: float, margin: float = 0.05, n: int = 100) -> dict[str, Any]:
    return {"value": value, "low": value - margin, "high": value + margin, "n": n}


def judge(by: str, rows: dict[str, float], agreement: dict[str, Any] | None, longer: float = 0.55) -> Judge:
    card: Any = None
    if agreement:
        card = {"agreement": agreement, "longer_wins": rate(longer), "worth": ""}
    made: Any = [
        {"ours": ours, "theirs": theirs, "rate": rate(value), "tally": {}, "verdict": "", "bar": Markup("")}
        for name, value in rows.items()
        for ours, theirs in [name.split("_vs_")]
    ]
    return {"name": f"{by} judge", "about": "", "by": by, "rows": made, "card": card}


GOOD, GUESS, LENGTH = rate(0.8), rate(0.52), rate(0.58)


@pytest.mark.parametrize(
    ("by", "rows", "agreement", "said"),
    [
        ("lm", {"dpo_vs_sft": 0.63}, GOOD, "DPO wins 63.0 % (58.0 to 68.0 %) against SFT: better, judged by"),
        ("lm", {"dpo_vs_sft": 0.37}, GOOD, "against SFT: worse, judged by the lm judge"),
        ("lm", {"dpo_vs_sft": 0.52}, GOOD, "against SFT: not shown to be better, judged by the lm judge"),
        ("gold", {"ppo_vs_sft": 0.63}, GUESS, "against SFT: better, judged by the gold judge"),
        (
            "lm",
            {"dpo_vs_sft": 0.63},
            GUESS,
            "DPO wins 63.0 % (58.0 to 68.0 %) against SFT: not shown to be better; the judge, the lm judge, "
            "agrees with 52.0 % of held-out votes, which is not shown to be better than guessing",
        ),
        (
            "lm",
            {"dpo_vs_sft": 0.3},
            LENGTH,
            "not shown to be better; the judge, the lm judge, agrees with 58.0 % of held-out votes, which is "
            "not shown to be better than “the longer answer wins” with 55.0 %",
        ),
        (
            "lm",
            {"dpo_vs_sft": 0.63},
            None,
            "not shown to be better; the judge, the lm judge, has not been graded",
        ),
        ("reward", {"ppo_vs_sft": 0.9}, GOOD, "not shown to be better; an upper bound, as PPO was trained"),
        ("reward", {"ppo_vs_sft": 0.2}, GOOD, "against SFT: worse; an upper bound"),
        ("reward", {"dpo_vs_sft": 0.9}, GOOD, "against SFT: better, judged by the reward judge"),
        (
            "lm",
            {"sft_vs_chosen": 0.7},
            GOOD,
            "SFT wins 70.0 % (65.0 to 75.0 %) against the chosen answers: better",
        ),
    ],
)
def test_a_verdict_needs_the_interval_and_the_judge(
    by: str, rows: dict[str, float], agreement: dict[str, Any] | None, said: str
) -> None:
    found = choose_headline([judge(by, rows, agreement)])
    assert found is not None
    assert said in found["sentence"].replace("\N{NO-BREAK SPACE}", " ")
    assert bool(found["doubt"]) == ("judged by" not in found["sentence"])


def test_the_best_trained_policy_is_named_by_the_first_judge() -> None:
    first = judge(
        "gold", {"sft_vs_base": 0.95, "ppo_vs_sft": 0.6, "dpo_vs_sft": 0.7, "champion_vs_sft": 0.9}, GOOD
    )
    found = choose_headline([first, judge("reward", {"ppo_vs_sft": 0.99}, GOOD)])
    assert found is not None
    assert (found["policy"], found["judge"]) == ("dpo", "the gold judge")


def test_without_comparisons_there_is_no_sentence() -> None:
    assert as_json(choose_headline([])) == {"sentence": ""}


def test_a_judge_none_of_whose_verdicts_could_be_read_is_not_graded() -> None:
    assert "has not been graded" in describe_doubt(judge("lm", {}, rate(0.9, n=0)), "dpo")
