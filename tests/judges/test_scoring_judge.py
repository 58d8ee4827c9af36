"""Test judges that score answers: each answer once, equal answers tie, the order does not matter."""

from collections.abc import Sequence

from tasks.demo_site.shell_tasks import SLOTS, TASKS, fill_slots
from tasks.judges.gold_judge import gold_judge
from tasks.judges.judge import Answer, Battle, ReportProgress
from tasks.judges.scoring_judge import Asked, ScoringJudge

SEEN: list[Asked] = []


def by_length(asked: Sequence[Asked], report_progress: ReportProgress) -> list[float]:
    report_progress(len(asked), len(asked))
    SEEN.extend(asked)
    return [float(len(answer.text)) for _, answer in asked]


def silent(done: int, total: int) -> None:
    pass


def test_the_higher_score_wins_in_both_orders_and_each_answer_is_scored_once() -> None:
    SEEN.clear()
    judge = ScoringJudge("length", "the judge of length", "It likes length.", score=by_length)
    short, long, other = Answer("a"), Answer("aaa"), Answer("bbb")
    battles = [Battle("q", short, long), Battle("q", long, short), Battle("q", long, other)]
    assert judge.compare(battles, silent) == ["second", "first", "tie"]
    assert len(SEEN) == 3
    assert judge.scores([("q", long), ("p", long)], silent) == [3.0, 3.0]
    assert SEEN[3:] == [("p", long)]  # the same answer to another question


def test_a_sampled_answer_is_not_the_written_one_with_the_same_text() -> None:
    SEEN.clear()
    judge = ScoringJudge("length", "", "", score=by_length)
    judge.scores([("q", Answer("a")), ("q", Answer("a", [1])), ("q", Answer("a", [1, 2]))], silent)
    assert len(SEEN) == 3


def test_the_gold_scorer_prefers_a_right_answer() -> None:
    judge = gold_judge()
    task, slots = TASKS[0], {name: values[0] for name, values in SLOTS.items()}
    question = fill_slots(task.questions[0], slots)
    right = Answer(f"```\n{fill_slots(task.commands[0], slots)}\n```\n\n{task.facts[0]}")
    noise = Answer("me too, thanks in advance")
    battles = [Battle(question, noise, right), Battle(question, right, noise)]
    assert judge.compare(battles, silent) == ["second", "first"]
