"""Test what a run prints on terminals of any width and into a file: progress, warnings, a summary that
stays visible.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from flows.display import terminal
from flows.display.formatting import key_figures
from flows.display.progress import Progress
from flows.display.terminal import drawing
from tasks.system import events
from tasks.system.events import Event

WARNING = (
    "The reward model is fooled: see "
    "/data/a/rather/long/path/without-any-space/objects/reward/d1f7c17814c1/summary.json for its "
    "well-known attacks."
)


def rate(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 500}


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    stage = {"key": "k" * 64, "digest": "d", "seconds": 1.5, "peak_mb": 30.0, "cached": False, "metrics": {}}
    names = {"reward": [WARNING], "ppo": []}
    stages = [{"name": name, **stage, "warnings": warnings} for name, warnings in names.items()]
    return {
        "metrics": metrics,
        "stages": stages,
        "seconds": 129.0,
        "report": "/h/report.html",
        "file": "/h/runs/1/summary.json",
        "failed": {},
        "not_run": {},
        "headline": "",
        "gates": "",
    }


@pytest.mark.parametrize("width", [0, 20, 80, 120, 200])
def test_warnings_and_result_come_last_and_no_word_or_path_is_broken(
    width: int, shown: Callable[..., str]
) -> None:
    metrics = {
        **{f"sft.figure_{number}": 1.0 for number in range(70)},
        "gold_win_rate.ppo_vs_sft": rate(0.755, 0.715, 0.791),
    }
    said = "PPO wins 75.5 % (71.5 to 79.1 %) against SFT: better, judged by the gold scorer"
    found = summary(metrics) | {"headline": said, "gates": "PPO passes all 6 gates."}
    text = shown(width, lambda: terminal.print_end(found))
    assert "sft.figure_1" not in text
    last = text[text.index("1 warning") :]
    assert " ".join(last.split()) == (
        f"1 warning - reward: {WARNING} Result: {said}. PPO passes all 6 gates."
    )
    if width:
        words = {word for word in f"{WARNING} {last}".split() if len(word) > width}
        assert all(len(line) <= width or set(line.split()) & words for line in last.splitlines())
    else:
        assert f"- reward: {WARNING}\n" in last  # one line in a file, to be found by its words
    assert "All figures  71 in /h/runs/1/summary.json" in " ".join(text.split(" "))


def test_a_run_without_comparisons_and_warnings_says_so_at_its_end(shown: Callable[..., str]) -> None:
    found = summary({"ppo.kl": 0.5})
    found["stages"][0]["warnings"] = []
    text = shown(80, lambda: terminal.print_end(found))
    assert "warning" not in text
    assert text.rstrip().endswith("/h/report.html\n\nResult: No policies were compared.")


def test_control_characters_and_markup_of_a_warning_are_shown_as_text(shown: Callable[..., str]) -> None:
    def draw() -> None:
        with drawing(terminal.Screen()):
            events.tell(
                "warning", "data", text="[red]a\x1b]0;title\x07 question \x1b[2J\x08 of [/bold] a post"
            )

    assert "Warning: [red]a question \ufffd of [/bold] a post" in shown(0, draw)


def test_a_screen_draws_nothing_after_its_end(shown: Callable[..., str]) -> None:
    def draw() -> None:
        with suppress(KeyError), drawing(terminal.Screen()):
            raise KeyError
        events.tell("warning", "data", text="too late")

    assert shown(0, draw) == "      starting   Prefect and MLflow\n"


def test_lines_say_which_of_how_many_stages(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", -1.0)

    def draw() -> None:
        with drawing(terminal.Screen()) as drawn:
            drawn.ready()
            events.tell("plan", stages=["site", "data", "sft"])
            events.tell("start", "data", key="k", shown=("loss",))
            events.tell(
                "step", "data", line={"step": 12_345_678, "total": 37_036_035, "unit": "bytes", "loss": 0.5}
            )
            events.tell("failed", "data")

    assert shown(0, draw).splitlines()[-2:] == [
        "  2/3 data       12.3 of 37.0 MB  loss 0.500",
        "  2/3 data       failed",
    ]


@pytest.mark.parametrize(
    ("first", "line", "text"),
    [
        ({"step": 0}, {"step": 50, "total": 100}, "50/100  5.0/s  10.0 s left"),
        ({"step": 0}, {"step": 5_000, "total": 0}, "5,000  500.0/s"),
        ({"step": 0}, {"step": 1, "total": 2}, "1/2  10.0 s/step  10.0 s left"),
        ({"step": 0}, {"step": 10, "total": 73}, "10/73  1.0/s  1 min 3 s left"),
        (
            {"step": 0, "unit": "bytes"},
            {"step": 999, "total": 999, "unit": "bytes"},
            "999 of 999 bytes  100 bytes/s",
        ),
        (
            {"step": 0, "unit": "bytes"},
            {"step": 2_500, "total": 9_999, "unit": "bytes"},
            "2.5 of 10.0 kB  250 bytes/s  30.0 s left",
        ),
        (
            {"step": 0, "unit": "bytes"},
            {"step": 10**11, "total": 10**12, "unit": "bytes"},
            "0.1 of 1.0 TB  10.0 GB/s  1 min 30 s left",
        ),
    ],
)
def test_progress_in_units_that_people_read(
    first: dict[str, Any], line: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Progress()
    pipeline.on_event(Event("start", "data", {"shown": ()}))
    progress = pipeline.at_work["data"]
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    progress.text(first)
    monkeypatch.setattr(time, "monotonic", lambda: 110.0)
    assert progress.text(line) == text


def test_key_figures_are_those_of_the_best_judge() -> None:
    both = {
        "reward_win_rate.ppo_vs_sft": 1,
        "gold_win_rate.ppo_vs_sft": 1,
        "ppo.kl": 1,
        "sft.best_step": 1,
        "reward_accuracy.votes": 1,
    }
    assert key_figures(both) == ["gold_win_rate.ppo_vs_sft", "ppo.kl", "reward_accuracy.votes"]
    assert key_figures({"reward_win_rate.ppo_vs_sft": 1}) == ["reward_win_rate.ppo_vs_sft"]


def test_two_stages_at_work_each_have_their_own_number_rate_and_figures(
    shown: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", -1.0)

    def draw() -> None:
        with drawing(terminal.Screen()):
            events.tell("plan", stages=["reward", "ppo", "dpo"])
            events.tell("start", "ppo", shown=("kl",))
            events.tell("start", "dpo", shown=("loss",))
            events.tell("step", "ppo", line={"step": 1, "total": 9, "kl": 0.25, "loss": 3.0})
            events.tell("step", "dpo", line={"step": 4, "total": 5, "kl": 0.75, "loss": 0.5})
            events.tell("failed", "dpo")
            events.tell("built", "ppo", artifact={"seconds": 2.0, "metrics": {"kl": 0.5}})
            events.tell("not_run", "reward", causes=["dpo"])

    lines = ["  2/3 ppo        1/9  kl 0.250", "  3/3 dpo        4/5  loss 0.500", "  3/3 dpo        failed"]
    lines += ["  2/3 ppo        built in 2.0 s  kl 0.500", "  1/3 reward     not run: dpo failed"]
    assert shown(0, draw).splitlines()[-5:] == lines
    rows = shown(120, draw)
    assert [name for name in ("ppo", "dpo", "reward") if f"/3 {name}" in rows] == ["ppo", "dpo", "reward"]


def test_what_failed_stands_in_the_table_of_stages(shown: Callable[..., str]) -> None:
    found = summary({}) | {"failed": {"dpo": "dpo: No."}, "not_run": {"winrate": ["ppo", "dpo"]}}
    rows = [" ".join(row.split()) for row in shown(0, lambda: terminal.print_end(found)).splitlines()]
    assert {"dpo failed", "winrate not run: ppo and dpo failed"} <= set(rows)


def test_a_judge_that_its_report_card_does_not_speak_for_has_no_key_figures() -> None:
    rate = {"value": 0.7, "low": 0.6, "high": 0.8, "n": 100}
    guess = {"value": 0.52, "low": 0.46, "high": 0.58, "n": 100}
    rule = {"value": 0.55, "low": 0.5, "high": 0.6, "n": 100}
    doubted = {"lm_win_rate.ppo_vs_sft": rate, "judge.lm.agreement": guess, "judge.lm.longer_wins": rule}
    trusted = {
        "reward_win_rate.ppo_vs_sft": rate,
        "judge.reward.agreement": rate,
        "judge.reward.longer_wins": rule,
    }
    assert key_figures(doubted) == ["lm_win_rate.ppo_vs_sft"]
    assert key_figures(doubted | trusted) == ["reward_win_rate.ppo_vs_sft"]


def test_the_last_line_says_what_was_shown_and_what_the_gates_say(shown: Callable[..., str]) -> None:
    found = summary({}) | {"headline": "PPO wins [b]78 %", "gates": "The gate kl refuses PPO."}
    out = shown(0, lambda: terminal.print_end(found))
    assert out.splitlines()[-1] == "Result: PPO wins [b]78 %. The gate kl refuses PPO."
