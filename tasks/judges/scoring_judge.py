"""Let a judge that scores answers decide battles: the higher score wins."""

from collections.abc import Sequence
from typing import Protocol

from tasks.judges.judge import Answer, Battle, ReportProgress
from tasks.rlhf.judging.verdicts import Verdict

Asked = tuple[str, Answer]  # a question and an answer to it


class Score(Protocol):
    """A function that scores answers to questions; higher is better."""

    def __call__(self, asked: Sequence[Asked], report_progress: ReportProgress, /) -> list[float]: ...


class ScoringJudge:
    """A judge by scores. Each answer is scored once, however many battles it is in.

    ``score`` returns the score of each question's answer. Two answers with equal scores tie.
    """

    def __init__(self, name: str, title: str, about: str, *, score: Score) -> None:
        self.name, self.title, self.about = name, title, about
        self._score = score
        self._known: dict[tuple[object, ...], float] = {}

    def scores(self, asked: Sequence[Asked], report_progress: ReportProgress) -> list[float]:
        """Return the score of each question's answer; those that are not known yet are scored together."""
        new = {_key(one): one for one in asked if _key(one) not in self._known}
        if new:
            self._known |= zip(new, self._score(list(new.values()), report_progress), strict=True)
        return [self._known[_key(one)] for one in asked]

    def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> list[Verdict]:
        """Return the verdicts, which do not depend on the order of the answers."""
        asked = [(one.question, answer) for one in battles for answer in (one.first, one.second)]
        scores = self.scores(asked, report_progress)
        return [_decide(a, b) for a, b in zip(scores[::2], scores[1::2], strict=True)]

    def warnings(self) -> list[str]:
        """Return none: the encoder of the score's texts reports what it has cut."""
        return []


def _decide(first: float, second: float) -> Verdict:
    if first == second:
        return "tie"
    return "first" if first > second else "second"


def _key(asked: Asked) -> tuple[object, ...]:
    question, answer = asked
    return question, answer.text, None if answer.ids is None else tuple(answer.ids)
