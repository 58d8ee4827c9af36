"""Test the score by a judge's preference: its scale, what is not asked, and what it may cost."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks.judges.chat_client import Address, Limits
from tasks.judges.endpoint_judge import EndpointJudge
from tasks.judges.judge import Battle, ReportProgress
from tasks.judges.preference import Preference
from tasks.judges.verdict_cache import VerdictCache
from tasks.rlhf.judging.verdicts import Verdict
from tasks.system.errors import InputError
from tests.support.judges.ask_endpoint import settings
from tests.support.judges.chat_server import KEY, Answer, ChatServer, serving

QUESTIONS = ["one?", "two?", "three?", "four?", "five?"]
THEIRS = ["same", "b", "c", "d", "e"]


class Planned:
    """A judge that says of each answer of ours what a test has planned, in both orders."""

    name, title, about = "lm", "the planned judge", ""

    def __init__(self, plan: dict[str, tuple[Verdict, Verdict]]) -> None:
        self.plan, self.asked = plan, list[Battle]()

    def compare(self, battles: Any, report_progress: ReportProgress) -> list[Verdict]:
        self.asked += battles
        return [
            self.plan[one.first.text][0] if one.first.text in self.plan else self.plan[one.second.text][1]
            for one in battles
        ]

    def warnings(self) -> list[str]:
        return [f"{len(self.asked)} asked"]


def phase(_: str) -> ReportProgress:
    return lambda done, total: None


def preference(judge: Any, state: dict[str, Any] | None = None) -> Preference:
    return Preference(lambda _: judge, QUESTIONS, phase=phase, state=state or {})


def test_a_score_is_the_mean_of_both_orders_and_the_same_answer_is_not_asked() -> None:
    plan: dict[str, tuple[Verdict, Verdict]] = {
        "wins": ("first", "second"), "loses": ("second", "first"), "flips": ("first", "first"),
        "nearly": ("first", "tie"),
    }  # fmt: skip
    judge = Planned(plan)
    found = preference(judge)
    found.start(THEIRS, num_comparisons=1)
    assert found(["same", "wins", "loses", "flips", "nearly"]) == [0.5, 1.0, 0.0, 0.5, 0.75]
    assert len(judge.asked) == 8
    assert {one.question for one in judge.asked} == set(QUESTIONS[1:])
    assert found(THEIRS) == [0.5] * 5, "a policy that is the opponent"
    assert len(judge.asked) == 8, "none of them was asked"


def test_a_pair_without_a_verdict_is_a_tie_and_is_counted_over_a_checkpoint() -> None:
    plan: dict[str, tuple[Verdict, Verdict]] = {"odd": ("unparseable", "second"), "wins": ("first", "second")}
    found = preference(Planned(plan))
    found.start(THEIRS, num_comparisons=1)
    assert found.warnings() == []
    assert found(["odd", "wins", "wins", "wins", "wins"]) == [0.5, 1.0, 1.0, 1.0, 1.0]
    again = preference(Planned(plan), json.loads(json.dumps(found.state())))
    assert again.warnings() == found.warnings()
    assert again(["same", "odd", "odd", "d", "e"])[1] == 0.5
    counted, cut = again.warnings()
    assert counted.startswith("Of 7 pairs of answers that were compared for ppo.score 3 count as ties")
    assert cut == "4 asked", "of the last comparison"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with serving(lambda prompt, before: Answer(text="A")) as running:
        yield running


def paid(server: ChatServer, folder: Path, state: dict[str, Any] | None = None, **changed: Any) -> Preference:
    """Return a preference by an endpoint judge, each of whose verdicts costs .002."""
    cache = VerdictCache(folder / "verdicts.db")

    def open_judge(spent: float) -> EndpointJudge:
        asked = settings(**changed)
        return EndpointJudge("t", Address(server.url, KEY), cache, asked, Limits(None, 5, 5), spent=spent)

    return Preference(open_judge, QUESTIONS, phase=phase, state=state or {})


def test_all_verdicts_of_a_training_must_be_affordable_before_the_first(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = paid(server, tmp_path)
    found.start(THEIRS, num_comparisons=7)
    said = capsys.readouterr().out
    assert "5 prompts, 7 times, in both orders, so at most 70 verdicts, which cost at most about 0.14" in said
    few = paid(server, tmp_path, max_cost=0.1)
    few.start(THEIRS, num_comparisons=2)
    with pytest.raises(InputError, match=r"judge\.max_cost is 0\.1: raise it, lower ppo\.score\.prompts"):
        few.start(THEIRS, num_comparisons=7)
    assert not server.asked


def test_what_was_spent_counts_over_a_checkpoint_and_nothing_is_paid_twice(
    server: ChatServer, tmp_path: Path
) -> None:
    found = paid(server, tmp_path)
    found.try_judge()
    assert sum(server.asked.values()) == 2
    found.start(THEIRS, num_comparisons=1)
    found(["w"] * 5)
    assert found.spent == pytest.approx(12 * 0.002)
    again = paid(server, tmp_path, found.state(), max_cost=0.03)
    again.try_judge()
    assert again.spent == found.spent
    again(["w"] * 5)
    assert set(server.asked.values()) == {1}
    with pytest.raises(InputError, match=r"beside 0\.04\d* spent; judge\.max_cost is 0\.03"):
        again(["v"] * 5)
    assert sum(server.asked.values()) == 12, "nothing was asked"


def test_a_judge_that_cannot_be_asked_is_known_at_once(tmp_path: Path) -> None:
    with serving(lambda prompt, before: Answer(status=401)) as refusing:
        with pytest.raises(InputError, match="ALIGNFLOW_JUDGE_KEY"):
            paid(refusing, tmp_path).try_judge()
