"""Test labels of the gold scorer and of judges."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tasks.demo_site.shell_tasks import SLOTS, TASKS, fill_slots
from tasks.judges.judge import Battle
from tasks.programs.rounds import labellers
from tasks.programs.rounds.labellers import gold_labels, gold_verdict, judge_labels
from tasks.programs.runtime.program import Run
from tasks.rlhf.judging.verdicts import Verdict
from tests.programs.rounds.rows import asked
from tests.support import tiny

VALUES = {name: values[0] for name, values in SLOTS.items()}
TITLE, FACT = fill_slots(TASKS[0].questions[0], VALUES), TASKS[0].facts[0]
PERFECT = f"Use `{fill_slots(TASKS[0].commands[0], VALUES)}`.\n\n{FACT}"  # 10 points
UNEXPLAINED = PERFECT.partition("\n")[0]  # 8 points
WRONG = f"Use `{fill_slots(TASKS[0].wrong[0], VALUES)}`."  # 2 points
COUNT = 10_000


def pair(name: str, first: str, second: str) -> dict[str, Any]:
    return asked(name, prompt=TITLE, first=first, second=second)


def pairs(count: int) -> list[dict[str, Any]]:
    """Return pairs, in half of which the second answer is better."""
    return [pair(f"p{n}", *[PERFECT, WRONG][:: 1 - 2 * (n % 2)]) for n in range(count)]


def wrong_share(noise: float, *, seed: int = 0) -> float:
    some = pairs(COUNT)
    found = gold_labels(some, noise=noise, tie=0.0, seed=seed)
    return sum(one.verdict != gold_verdict(row) for one, row in zip(found, some, strict=True)) / COUNT


def test_the_gold_scorer_prefers_the_better_answer_and_ties_within_points() -> None:
    assert gold_verdict(pair("a", PERFECT, WRONG)) == "first"
    assert gold_verdict(pair("a", WRONG, PERFECT)) == "second"
    assert gold_verdict(pair("a", PERFECT, PERFECT)) == "tie"
    assert gold_verdict(pair("a", UNEXPLAINED, PERFECT), tie=1.9) == "second"
    assert gold_verdict(pair("a", UNEXPLAINED, PERFECT), tie=2.0) == "tie"


def test_so_many_verdicts_are_turned_round_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labellers, "gold_score", lambda _, answer: len(answer))  # it takes half a ms
    assert wrong_share(0.0) == 0
    assert abs(wrong_share(0.1) - 0.1) < 3 * (0.1 * 0.9 / COUNT) ** 0.5
    assert abs(wrong_share(0.5) - 0.5) < 3 * (0.25 / COUNT) ** 0.5


def test_noise_depends_on_the_seed_and_the_pair_alone() -> None:
    some = pairs(200)
    found = gold_labels(some, noise=0.3, tie=0.0, seed=1)
    assert gold_labels(some[::-1], noise=0.3, tie=0.0, seed=1) == found[::-1]
    assert gold_labels(some[:7], noise=0.3, tie=0.0, seed=1) == found[:7]
    assert gold_labels(some, noise=0.3, tie=0.0, seed=2) != found
    more = gold_labels(some, noise=0.4, tie=0.0, seed=1)
    exact = gold_labels(some, noise=0.0, tie=0.0, seed=1)
    turned, turned_more = (
        {one.pair_id for one, other in zip(labels, exact, strict=True) if one != other}
        for labels in (found, more)
    )
    assert turned < turned_more, "more noise turns the same pairs, and others"


def test_noise_leaves_ties_as_they_are() -> None:
    labels = gold_labels([pair(f"p{n}", PERFECT, PERFECT) for n in range(20)], noise=0.5, tie=0.0, seed=0)
    assert {(one.verdict, one.rater, one.source, one.time) for one in labels} == {("tie", "gold", "gold", "")}


class Scripted:
    """A judge with given verdicts by the answer that it is shown first."""

    name, title, about = "lm", "the script", "It reads from a script."

    def __init__(self, verdicts: dict[str, Verdict]) -> None:
        self.verdicts = verdicts

    def compare(self, battles: Sequence[Battle], report_progress: Any) -> list[Verdict]:
        return [self.verdicts[one.first.text] for one in battles]

    def warnings(self) -> list[str]:
        return []


@pytest.mark.parametrize(
    ("first_shown", "second_shown", "expected"),
    [
        ("first", "second", "first"),
        ("second", "first", "second"),
        ("first", "first", "tie"),  # it flips with the order
        ("tie", "tie", "tie"),
        ("unparseable", "second", "skip"),
    ],
)
def test_a_judge_is_asked_in_both_orders(
    tmp_path: Path, first_shown: Verdict, second_shown: Verdict, expected: str
) -> None:
    run = Run(tiny.write_job(tmp_path / "run", "comparisons", {}, {}))
    judge = Scripted({"a one": first_shown, "a two": second_shown})
    (label,) = judge_labels(judge, [asked("a")], run)
    assert (label.verdict, label.rater, label.source) == (expected, "lm", "judge:lm")
