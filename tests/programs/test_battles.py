"""Test the path from a judge's verdicts to win rates with planted judges, whose bias is known."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest

from tasks.judges.judge import Answer, Battle, ReportProgress
from tasks.programs.runtime import battles
from tasks.programs.runtime.battles import Question
from tasks.programs.runtime.program import Run
from tasks.rlhf.judging.verdicts import Verdict

N = 400
TRUE_RATE = 0.7  # of the policy "good" against the policy "plain"


class PlantedJudge:
    """A judge that decides by a function."""

    name, title, about = "planted", "the planted judge", "It is planted."

    def __init__(self, decide: Callable[[Battle], Verdict]) -> None:
        self.decide = decide

    def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> list[Verdict]:
        """Decide each battle by itself."""
        report_progress(len(battles), len(battles))
        return [self.decide(one) for one in battles]


def questions(seed: int = 0) -> list[Question]:
    """Return questions to which "good" has the better answer, marked "right", with the true rate."""
    rng = random.Random(seed)
    found = []
    for id in range(N):
        texts = ["right " + "x" * rng.randint(1, 60), "wrong " + "x" * rng.randint(1, 60)]
        good, plain = texts if rng.random() < TRUE_RATE else texts[::-1]
        found.append(Question(id, f"question {id}", {"plain": Answer(plain), "good": Answer(good)}, []))
    return found


def pairs(seed: int = 1) -> list[dict[str, object]]:
    rng = random.Random(seed)
    return [
        {
            "question_id": id // 3,
            "prompt": f"question {id}",
            "chosen": "right " + "x" * rng.randint(1, 60),
            "rejected": "wrong " + "x" * rng.randint(1, 60),
        }
        for id in range(900)
    ]


def true(battle: Battle) -> Verdict:
    return "first" if battle.first.text.startswith("right") else "second"


def longer(battle: Battle) -> Verdict:
    a, b = len(battle.first.text), len(battle.second.text)
    return "tie" if a == b else "first" if a > b else "second"


def chance(seed: int) -> Callable[[], float]:
    return random.Random(seed).random


def unparseable(share: float) -> Callable[[Battle], Verdict]:
    draw = chance(2)
    return lambda battle: "unparseable" if draw() < share else true(battle)


def noisy(right: float) -> Callable[[Battle], Verdict]:
    """A judge that is right about so many answers, whatever their order."""

    def decide(battle: Battle) -> Verdict:
        both = "".join(sorted([battle.first.text, battle.second.text]))
        wrong = random.Random(battle.question + both).random() > right
        swapped = Battle(battle.question, battle.second, battle.first)
        return true(swapped) if wrong else true(battle)

    return decide


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "job.json").write_text(json.dumps({"stage": "winrate", "job": {}, "inputs": {}}))
    return Run(tmp_path)


def rates(run: Run, decide: Callable[[Battle], Verdict]) -> dict[str, dict[str, float]]:
    judge = PlantedJudge(decide)
    judged = battles.judge_all(judge, questions(), ["plain", "good"], run)
    _, graded = battles.grade(judge, pairs(), run)
    return battles.rate_metrics("planted", judged, graded)


RATE, EQUAL, CORRECTED = (
    f"planted_win_rate{kind}.good_vs_plain" for kind in ("", "_at_equal_length", "_corrected")
)


def test_a_true_judge_finds_the_true_rate(run: Run) -> None:
    found = rates(run, true)
    for name in (RATE, EQUAL, CORRECTED):
        assert found[name]["low"] <= TRUE_RATE <= found[name]["high"]
    assert found["planted.flipped"] == 0


def test_a_judge_that_prefers_the_first_answer_says_nothing(run: Run) -> None:
    found = rates(run, lambda _: "first")
    assert found[RATE]["value"] == 0.5
    assert found["planted.flipped"] == 1
    assert CORRECTED not in found


def test_a_judge_of_length_has_an_even_rate_at_equal_length(run: Run) -> None:
    found = rates(run, longer)
    assert found[EQUAL]["low"] <= 0.5 <= found[EQUAL]["high"]


def test_a_random_judge_is_at_one_half_and_is_not_corrected(run: Run) -> None:
    draw = chance(3)
    found = rates(run, lambda _: "first" if draw() < 0.5 else "second")
    assert found[RATE]["low"] <= 0.5 <= found[RATE]["high"]
    assert CORRECTED not in found


def test_what_cannot_be_read_is_no_loss(run: Run) -> None:
    found = rates(run, unparseable(0.1))
    assert found[RATE]["low"] <= TRUE_RATE <= found[RATE]["high"]
    assert found["planted.unparseable"] == pytest.approx(0.19, abs=0.05)
    everything = rates(run, lambda _: "unparseable")
    assert np.isnan(everything[RATE]["value"])
    assert (everything[RATE]["low"], everything[RATE]["high"]) == (0, 1)


def test_a_noisy_judge_sees_too_little_and_the_correction_finds_the_true_rate(run: Run) -> None:
    found = rates(run, noisy(0.75))
    assert found[RATE]["high"] < TRUE_RATE
    assert found[CORRECTED]["low"] <= TRUE_RATE <= found[CORRECTED]["high"]


def test_the_leaderboard_and_the_table_of_verdicts_hold_every_battle(run: Run) -> None:
    three = [Question(one.id, one.text, {**one.answers, "bad": Answer("wrong")}, []) for one in questions()]
    names = ["bad", "plain", "good"]
    judged = battles.judge_all(PlantedJudge(unparseable(0.05)), three, names, run)
    board = battles.leaderboard(judged, names)
    assert board[0]["policy"] == "good"
    assert board[0]["ranks"][0] == 1
    table = battles.verdict_table({"planted": judged})
    assert table.num_rows == 3 * N
    assert set(table["shown_first"].to_pylist()) <= {"first", "second", "tie", "unparseable"}
    counts = dict(judged.counts("planted"))["planted.good_vs_plain"]
    rows = table.filter(pc.and_(pc.equal(table["ours"], "good"), pc.equal(table["theirs"], "plain")))
    assert rows["outcome"].null_count == counts["unparseable"]
    assert counts["wins"] + counts["ties"] + counts["losses"] + counts["unparseable"] == N
    nothing = battles.judge_all(PlantedJudge(lambda _: "unparseable"), three, names, run)
    assert battles.leaderboard(nothing, names) == []


@pytest.mark.parametrize(
    ("decide", "words"),
    [
        (true, "is better than guessing and than length"),
        (lambda _: "first", "not shown to be better than guessing"),
        (longer, "not shown to be better than guessing"),
        (lambda _: "unparseable", "could be read"),
    ],
)
def test_a_sentence_says_what_a_judge_is_worth(
    run: Run, decide: Callable[[Battle], Verdict], words: str
) -> None:
    judge = PlantedJudge(decide)
    card, _ = battles.grade(judge, pairs(), run)
    assert words in battles.describe_card(judge, card)


def test_a_judge_of_length_is_told_from_one_of_quality(run: Run) -> None:
    rows = [row | {"chosen": f"{row['chosen']} {'x' * 40}"} for row in pairs()]
    judge = PlantedJudge(longer)
    card, _ = battles.grade(judge, rows, run)
    assert card.agreement.low > 0.5
    assert "not shown to be better than “longer wins”" in battles.describe_card(judge, card)
