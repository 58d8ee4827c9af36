"""Score answers by how often a judge prefers them to other answers to the same questions."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tasks.judges.endpoint_judge import EndpointJudge
from tasks.judges.judge import Answer, Battle, Judge, ReportProgress
from tasks.rlhf.judging.verdicts import to_outcomes
from tasks.system.errors import InputError

OpenJudge = Callable[[float], Judge]  # returns the judge without counts; it is told what was paid before
TRIAL = (Answer("Yes."), Answer("No."))


class Preference:
    """Scores a policy's answers against an opponent's: a win is 1, a tie 1/2, a loss 0, the mean of both
    orders.

    An answer that is the opponent's own is a tie, and the judge is not asked. So is a pair of which a verdict
    cannot be read.
    """

    def __init__(
        self,
        open_judge: OpenJudge,
        questions: Sequence[str],
        *,
        phase: Callable[[str], ReportProgress],
        state: dict[str, Any],
    ) -> None:
        """``phase`` returns a function that reports the progress of what it names."""
        self.open_judge, self.questions, self.phase = open_judge, questions, phase
        self.opponents: list[str] = state.get("opponents", [])  # answers; empty before the start
        self.spent: float = state.get("spent", 0.0)
        self.num_compared: int = state.get("num_compared", 0)  # pairs
        self.num_unreadable: int = state.get("num_unreadable", 0)
        self.notes: list[str] = state.get("notes", [])  # of the last comparison

    def try_judge(self) -> None:
        """Ask the judge about one pair, so that one that cannot be asked is known at once.

        Raises InputError.
        """
        question = min(self.questions, key=len)
        judge = self.open_judge(self.spent)
        judge.compare(_in_both_orders([Battle(question, *TRIAL)]), self.phase("trying the judge"))
        if not self.opponents:  # the reply is kept, and paid once
            self._count_cost(judge)

    def start(self, opponents: Sequence[str], *, num_comparisons: int) -> None:
        """Take the opponent's answers, and say what comparing with them as often as that costs at most.

        Raises InputError if it is more than the judge may cost.
        """
        self.opponents = list(opponents)
        total = 2 * len(self.opponents) * num_comparisons
        times = f"{len(self.opponents):,} prompts, {num_comparisons:,} times, in both orders"
        sentence = f"ppo.score.by=judge: {times}, so at most {total:,} verdicts"
        judge = self.open_judge(self.spent)
        if isinstance(judge, EndpointJudge):
            same = [Battle(q, Answer(a), Answer(a)) for q, a in zip(self.questions, opponents, strict=True)]
            cost, limit = 2 * num_comparisons * judge.estimate(same).cost, judge.settings.max_cost
            sentence += f", which cost at most about {cost:.4g} beside {self.spent:.4g} spent"
            if self.spent + cost > limit:
                raise InputError(
                    f"{sentence}; judge.max_cost is {limit:.4g}: raise it, lower ppo.score.prompts or raise "
                    "ppo.score.every"
                )
        print(sentence, flush=True)

    def __call__(self, answers: Sequence[str]) -> list[float]:
        """Return the score of each question's answer. Raises InputError if the judge cannot be asked."""
        pairs = zip(answers, self.opponents, strict=True)
        places = [place for place, (ours, theirs) in enumerate(pairs) if ours != theirs]
        scores = np.full(len(answers), 0.5)
        if not places:
            return list(map(float, scores))
        battles = [
            Battle(self.questions[place], Answer(answers[place]), Answer(self.opponents[place]))
            for place in places
        ]
        judge = self.open_judge(self.spent)
        verdicts = judge.compare(_in_both_orders(battles), self.phase(f"judging by {judge.name}"))
        first, second = to_outcomes(verdicts[: len(battles)]), to_outcomes(verdicts[len(battles) :])
        means = (first + 1 - second) / 2
        is_unreadable = np.isnan(means)
        scores[places] = np.where(is_unreadable, 0.5, means)
        self.num_compared += len(places)
        self.num_unreadable += int(is_unreadable.sum())
        self.notes = judge.warnings()
        self._count_cost(judge)
        return list(map(float, scores))

    def _count_cost(self, judge: Judge) -> None:
        if isinstance(judge, EndpointJudge):
            self.spent = judge.spent

    def warnings(self) -> list[str]:
        """Return sentences on pairs without a verdict, and on what was cut in the last comparison."""
        if not self.num_unreadable:
            return self.notes
        return [
            f"Of {self.num_compared:,} pairs of answers that were compared for ppo.score "
            f"{self.num_unreadable:,} count as ties, because a verdict of the judge could not be read.",
            *self.notes,
        ]

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint needs."""
        names = ("opponents", "spent", "num_compared", "num_unreadable", "notes")
        return {name: getattr(self, name) for name in names}


def _in_both_orders(battles: Sequence[Battle]) -> list[Battle]:
    return [*battles, *(Battle(one.question, one.second, one.first) for one in battles)]
