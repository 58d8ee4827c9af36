"""Judge answers by the built-in site's gold scorer."""

from collections.abc import Sequence

from tasks.demo_site.gold import gold_score
from tasks.judges.judge import ReportProgress
from tasks.judges.scoring_judge import Asked, ScoringJudge


def gold_judge() -> ScoringJudge:
    """Return the gold scorer as a judge. It knows the questions of the built-in site only."""
    return ScoringJudge(
        "gold",
        "the gold scorer",
        "The gold scorer knows what is right; no training stage reads it, but rounds may learn its labels.",
        score=_score,
    )


def _score(asked: Sequence[Asked], report_progress: ReportProgress) -> list[float]:
    del report_progress  # it takes no time
    return [gold_score(question, answer.text) for question, answer in asked]
