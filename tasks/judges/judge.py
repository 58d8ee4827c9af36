"""Define what a judge is: it decides which of two answers to a question is better.

Every judge has this interface and a file of its own in this folder. ``load_judges`` in
tasks/programs/runtime/job_judges.py makes the judges of a run: add a new judge there, and to ``JUDGES`` in
flows/display/formatting.py, which names it at the end of a run. tasks/programs/winrate.py asks each judge
every battle in both orders, and tasks/rlhf/judging/ makes win rates of the verdicts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from tasks.rlhf.judging.verdicts import Verdict

ReportProgress = Callable[[int, int], None]  # called with what is done and the total


class Answer(NamedTuple):
    """An answer to a question."""

    text: str
    ids: list[int] | None = None  # as the policy sampled it, in the merged model's tokens; None: written text


class Battle(NamedTuple):
    """Two answers to one question, in the order in which a judge is shown them."""

    question: str
    first: Answer
    second: Answer


class Judge(Protocol):
    """Decides battles."""

    @property
    def name(self) -> str:
        """A word for metrics and columns, such as "gold"."""

    @property
    def title(self) -> str:
        """The judge's name in a sentence, such as "the gold scorer"."""

    @property
    def about(self) -> str:
        """One sentence about what the judge is and what its verdict is worth, for the report."""

    def compare(self, battles: Sequence[Battle], report_progress: ReportProgress) -> list[Verdict]:
        """Return a verdict for each battle, in their order."""

    def warnings(self) -> list[str]:
        """Return sentences on what was wrong with the verdicts so far, such as prompts that were cut."""
