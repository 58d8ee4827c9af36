"""Have a judge decide battles in both orders, and describe what its verdicts say."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tasks.judges.judge import Answer, Battle, Judge
from tasks.programs.runtime.program import Run
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging import leaderboard as boards
from tasks.rlhf.judging.judge_correction import Graded, corrected_interval
from tasks.rlhf.judging.length_control import controlled_rate, length_feature
from tasks.rlhf.judging.report_card import ReportCard, grade_judge, is_better_than_length
from tasks.rlhf.judging.verdicts import Counts, Outcomes, Verdict, resolve, to_outcomes
from tasks.rlhf.judging.win_rate import win_rate


class Question(NamedTuple):
    """A held-out question with everyone's answers."""

    id: int
    text: str
    answers: dict[str, Answer]  # by policy; "chosen" is the best voted one
    voted: list[str]  # all answers that were voted on


class Judged(NamedTuple):
    """A judge's verdicts on every pair of policies, B rows in the order of pairs and questions."""

    pairs: list[tuple[str, str]]  # (ours, theirs)
    first: list[Verdict]  # (B,), our answer shown first
    second: list[Verdict]  # (B,), our answer shown second
    outcomes: Outcomes  # (B,), of our answer
    flipped: NDArray[np.bool_]  # (B,)
    questions: NDArray[np.int64]  # (Q,) ids
    lengths: dict[str, NDArray[np.float64]]  # characters of each policy's answers, (Q,)

    def of_pair(self, number: int) -> slice:
        """Return the rows of a pair."""
        size = len(self.questions)
        return slice(number * size, (number + 1) * size)

    def counts(self, judge: str) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield each pair's name and its numbers of battles by outcome."""
        for number, (ours, theirs) in enumerate(self.pairs):
            rows = self.of_pair(number)
            flipped = int(self.flipped[rows].sum())
            counts = Counts.of(self.outcomes[rows])._asdict() | {"flipped": flipped}
            yield f"{judge}.{ours}_vs_{theirs}", counts


def in_both_orders(battles: Sequence[Battle]) -> list[Battle]:
    """Return the battles with the answers as they are, then all of them with the second one shown first."""
    return [*battles, *(Battle(one.question, one.second, one.first) for one in battles)]


def compare_in_both_orders(
    judge: Judge, battles: Sequence[Battle], run: Run, name: str
) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts with the answers as they are, and with the second one shown first."""
    verdicts = judge.compare(in_both_orders(battles), run.phase(name))
    return verdicts[: len(battles)], verdicts[len(battles) :]


def voted_battles(pairs: Sequence[dict[str, Any]]) -> list[Battle]:
    """Return the battles on which a judge is graded."""
    return [Battle(row["prompt"], Answer(row["chosen"]), Answer(row["rejected"])) for row in pairs]


def pairs_of(policies: Sequence[str]) -> list[tuple[str, str]]:
    """Return every pair of policies (ours, theirs)."""
    return [(ours, theirs) for theirs, ours in combinations(policies, 2)]


def policy_battles(questions: Sequence[Question], policies: Sequence[str]) -> list[Battle]:
    """Return the battles of every pair of policies, in the order of pairs and questions."""
    return [
        Battle(one.text, one.answers[ours], one.answers[theirs])
        for ours, theirs in pairs_of(policies)
        for one in questions
    ]


def grade(judge: Judge, pairs: Sequence[dict[str, Any]], run: Run) -> tuple[ReportCard, Graded]:
    """Return a judge's report card, and its graded verdicts, on pairs that voters have ordered.

    A pair is a row {question_id, prompt, chosen, rejected}.
    """
    first, second = compare_in_both_orders(
        judge, voted_battles(pairs), run, f"grading the judge {judge.name}"
    )
    forward, backward = to_outcomes(first), 1 - to_outcomes(second)
    lengths = np.array([[len(row["chosen"]), len(row["rejected"])] for row in pairs], dtype=np.float64)
    ids = np.array([row["question_id"] for row in pairs], dtype=np.int64)
    return grade_judge(forward, backward, lengths, ids), Graded(forward, backward, ids)


def judge_all(judge: Judge, questions: Sequence[Question], policies: Sequence[str], run: Run) -> Judged:
    """Return a judge's verdicts on the answers of every pair of policies to every question."""
    battles = policy_battles(questions, policies)
    first, second = compare_in_both_orders(judge, battles, run, f"judging by {judge.name}")
    resolved = resolve(first, second)
    lengths = {
        name: np.array([len(one.answers[name].text) for one in questions], dtype=np.float64)
        for name in policies
    }
    ids = np.array([one.id for one in questions], dtype=np.int64)
    return Judged(pairs_of(policies), first, second, resolved.outcomes, resolved.flipped, ids, lengths)


def rate_metrics(judge: str, judged: Judged, graded: Graded | None) -> dict[str, Any]:
    """Return the win rate of each pair: raw, at equal length, and corrected for the judge's errors.

    The judge's errors are those on voted answers; on sampled ones it may err more or less often.
    """
    metrics: dict[str, Any] = {}
    ids = judged.questions
    for number, (ours, theirs) in enumerate(judged.pairs):
        outcomes, pair = judged.outcomes[judged.of_pair(number)], f"{ours}_vs_{theirs}"
        metrics[f"{judge}_win_rate.{pair}"] = win_rate(outcomes, ids)._asdict()
        feature = length_feature(judged.lengths[ours], judged.lengths[theirs])
        controlled = controlled_rate(outcomes, feature[:, None], ids)
        metrics[f"{judge}_win_rate_at_equal_length.{pair}"] = controlled._asdict()
        if graded is not None and (found := corrected_interval(outcomes, ids, graded)) is not None:
            metrics[f"{judge}_win_rate_corrected.{pair}"] = found._asdict()
    known = ~np.isnan(judged.outcomes)
    metrics[f"{judge}.flipped"] = float(judged.flipped[known].mean()) if known.any() else 0.0
    metrics[f"{judge}.unparseable"] = float(1 - known.mean())
    return metrics


def leaderboard(judged: Judged, policies: Sequence[str]) -> list[dict[str, Any]]:
    """Return the ranking of all policies by one judge, the best first."""
    if np.isnan(judged.outcomes).all():
        return []
    number_of = {name: number for number, name in enumerate(policies)}
    size = len(judged.questions)
    columns = [np.repeat([number_of[pair[side]] for pair in judged.pairs], size) for side in (0, 1)]
    questions = np.tile(judged.questions, len(judged.pairs))
    rows = boards.rank(policies, columns[0], columns[1], judged.outcomes, questions)
    return [
        {
            "policy": row.policy,
            "strength": row.strength._asdict(),
            "elo": row.elo,
            "ranks": row.ranks,
            "characters": float(judged.lengths[row.policy].mean()),
        }
        for row in rows
    ]


def describe_card(judge: Judge, card: ReportCard) -> str:
    """Return in one sentence what a judge's verdict is worth."""
    agreed = f"it agrees with {_percent(card.agreement)} of the votes"
    rule = f"the rule “longer wins” with {100 * card.longer_wins.value:.1f} %"
    if card.agreement.n == 0:
        return f"No verdict of {judge.title} on held-out votes could be read."
    if card.agreement.low <= 0.5:
        return f"On held-out votes {judge.title} is not shown to be better than guessing: {agreed}, {rule}."
    if not is_better_than_length(card):
        return (
            f"On held-out votes {judge.title} is not shown to be better than “longer wins”: {agreed}, {rule}."
        )
    return f"On held-out votes {judge.title} is better than guessing and than length: {agreed}, {rule}."


def _percent(rate: Interval) -> str:
    return f"{100 * rate.value:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f} %)"


def verdict_table(judged: dict[str, Judged]) -> pa.Table:
    """Return one row for each battle of each judge, with both orders' verdicts."""
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("judge", "ours", "theirs", "question_id", "shown_first", "shown_second", "outcome")
    }
    for judge, found in judged.items():
        ids = found.questions.tolist()
        for ours, theirs in found.pairs:
            columns["judge"] += [judge] * len(ids)
            columns["ours"] += [ours] * len(ids)
            columns["theirs"] += [theirs] * len(ids)
            columns["question_id"] += ids
        columns["shown_first"] += found.first
        columns["shown_second"] += found.second
        columns["outcome"] += [None if np.isnan(one) else float(one) for one in found.outcomes]
    return pa.table(columns)
