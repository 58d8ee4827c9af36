"""Test what rounds print on a terminal and into a file: one line a round, and a table at the end."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from flows.display import rounds_screen
from flows.display.rounds_screen import RoundsScreen, print_rounds_end
from flows.display.rounds_summary import as_markdown, describe_rounds, summarise_round
from flows.display.terminal import drawing
from tasks.rounds.round_walk import Round
from tasks.rounds.verdict import judge_round
from tasks.system import events

POLICY: Any = {"key": "policy"}
GOLD = "gold_win_rate.ppo_vs_"


def rate(value: float, half: float = 0.05) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": 300}


def line(number: int, policy: Any = POLICY, **metrics: Any) -> dict[str, Any]:
    one = Round(number, policy, None, None, None, f"run{number}", metrics)
    standing = number - 1 if f"{GOLD}predecessor" in metrics else None
    verdict = judge_round(metrics, number=number, standing=standing)
    stages = [{"name": "ppo", "warnings": [f"Watch out in round {number}."]}]
    return summarise_round(one, verdict, {"seconds": 61.0, "stages": stages, "file": f"/h/runs/f-{number}/s"})


def summary(*lines: dict[str, Any], best: int | None) -> dict[str, Any]:
    run = None if best is None else f"run{best}"
    files = {"file": "/h/runs/f-2/all-rounds.json", "report": "/h/report.html"}
    return {"rounds": list(lines), "count": 3, "best": best, "run": run, "seconds": 130.0, **files}


START = line(0, None)
WON = line(1, **{f"{GOLD}sft": rate(0.6), "comparisons.asked": 200, "comparisons.pairs": 181})
LOST = line(2, **{f"{GOLD}sft": rate(0.55), f"{GOLD}predecessor": rate(0.44), "ppo.kl": rate(1.25)})


def run_two_rounds() -> None:
    with drawing(RoundsScreen()) as screen:
        screen.ready()
        for number, told in ((0, START), (1, WON)):
            events.tell("round", number=number, count=3)
            events.tell("plan", stages=["reward", "ppo"])
            events.tell("start", "ppo", shown=("kl",))
            events.tell("step", "ppo", line={"step": 1, "total": 9, "kl": 0.25})
            events.tell("built", "ppo", artifact={"seconds": 2.0, "metrics": {"kl": 0.5}})
            events.tell("warning", "ppo", text=f"ppo: number {number}")
            events.tell("round_end", number=number, text=told["sentence"])


def test_a_round_is_one_line_in_a_file(shown: Callable[..., str]) -> None:
    assert shown(0, run_two_rounds).splitlines() == [
        "      starting   Prefect and MLflow",
        "Warning: ppo: number 0",
        "      round 0    the first answers are those of the SFT model  (1 min 1 s)",
        "Warning: ppo: number 1",
        "  1/3 round 1    won: 60.0 % (55.0 to 65.0, n 300) against SFT, by the gold scorer  (1 min 1 s)",
    ]


def test_a_file_shows_now_and_then_how_far_a_round_is(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_screen, "PLAIN_SECONDS", -1.0)
    lines = shown(0, run_two_rounds).splitlines()
    assert "  1/3 round 1    stage 2 of 2, ppo: 1/9  kl 0.250" in lines


def test_what_fails_is_told_at_once(shown: Callable[..., str]) -> None:
    def fail() -> None:
        with drawing(RoundsScreen()):
            events.tell("round", number=2, count=3)
            events.tell("plan", stages=["mixture", "reward"])
            events.tell("start", "mixture", shown=())
            events.tell("failed", "mixture")
            events.tell("not_run", "reward", causes=["mixture"])

    assert shown(0, fail).splitlines()[-2:] == [
        "  2/3 round 2    stage 1 of 2, mixture: failed",
        "  2/3 round 2    stage 2 of 2, reward: not run: mixture failed",
    ]


def test_a_terminal_has_one_row_a_round(shown: Callable[..., str]) -> None:
    last = shown(150, run_two_rounds).splitlines()[-3:]
    rows = [re.sub(r"\x1b\[[\d;]*\w", "", row).split() for row in last if "round" in row]
    assert [row[: row.index("round") + 2] for row in rows] == [["round", "0"], ["1/3", "round", "1"]]
    assert "won: 60.0 % (55.0 to 65.0, n 300) against SFT" in " ".join(rows[1])


def test_the_end_is_a_table_of_rounds_and_what_to_do(shown: Callable[..., str]) -> None:
    out = shown(0, lambda: print_rounds_end(summary(START, WON, LOST, best=1)))
    rows = [" ".join(row.split()) for row in out.splitlines()]
    assert rows[1:5] == [
        "round asked pairs against the earlier round against SFT KL outcome time",
        "0 1 min 1 s",
        "1 200 181 0.600 (0.550 to 0.650) won, best 1 min 1 s",
        "2 0.440 (0.390 to 0.490) 0.550 (0.500 to 0.600) 1.250 lost 1 min 1 s",
    ]
    assert "Promotion `alignflow promote run1` judges round 1" in rows
    assert rows[rows.index("- ppo: Watch out in round 2.") - 1] == "1 warning of the last round"
    assert rows[-1].startswith("Result: Round 1 is the last that won (60.0 %")


def test_a_sentence_for_each_way_to_end() -> None:
    won = describe_rounds(summary(START, WON, LOST, best=1))
    assert won == (
        "Round 1 is the last that won (60.0 % (55.0 to 65.0, n 300) against SFT, by the gold scorer); "
        "2 of 3 rounds were run, as round 2 was lost."
    )
    votes = describe_rounds(summary(WON | {"number": 0}, LOST | {"number": 1}, best=0))
    assert votes.startswith("No round was shown to win against the policy that was trained on votes; 1 of 3")
    none = describe_rounds(summary(START, LOST | {"number": 3}, best=None))
    assert none == "No round was shown to win, so there is nothing to promote; 3 of 3 rounds were run."


def test_the_table_in_markdown_has_a_row_a_round() -> None:
    rows = as_markdown(summary(START, WON, LOST, best=1)).splitlines()
    assert len(rows) == 5
    assert {row.count("|") for row in rows} == {9}
