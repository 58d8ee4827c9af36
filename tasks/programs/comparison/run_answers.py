"""Read the answers of finished runs, and find the questions and the answers that they share."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from tasks.config.policies import POLICIES
from tasks.judges.judge import Answer
from tasks.programs.runtime.battles import Question


class RunAnswers(NamedTuple):
    """What the policies of one run answered; all by the question's id."""

    questions: dict[int, str]
    answers: dict[str, dict[int, Answer]]  # by policy
    kl: dict[str, dict[int, float | None]]  # by policy, nats


class Contestant(NamedTuple):
    """A policy of one of the runs."""

    run: int  # counted from 0
    policy: str

    @property
    def name(self) -> str:
        """Return a word for metrics and columns, such as "ppo1" for PPO of the first run."""
        return f"{self.policy}{self.run + 1}"


def read_answers(folder: Path) -> RunAnswers:
    """Read an artifact of the stage answers."""
    columns = pq.read_table(folder / "answers.parquet").to_pydict()
    ids = columns["question_id"]
    policies = [policy for policy in POLICIES if f"{policy}.answer" in columns]  # without the champion
    answers = {
        policy: {
            id: Answer(text, tokens)
            for id, text, tokens in zip(
                ids, columns[f"{policy}.answer"], columns[f"{policy}.tokens"], strict=True
            )
        }
        for policy in policies
    }
    kl = {policy: dict(zip(ids, columns[f"{policy}.kl"], strict=True)) for policy in policies}
    return RunAnswers(dict(zip(ids, columns["question"], strict=True)), answers, kl)


def shared_questions(runs: Sequence[RunAnswers]) -> list[int]:
    """Return the ids of the questions that all runs have answered, in rising order.

    Two data sets may number different questions alike, so the texts have to be the same too.
    """
    first, *others = (run.questions for run in runs)
    return sorted(id for id, text in first.items() if all(questions.get(id) == text for questions in others))


def are_equal(first: Contestant, second: Contestant, runs: Sequence[RunAnswers], ids: Sequence[int]) -> bool:
    """Return whether two policies have answered all these questions with the same texts."""
    ours, theirs = (runs[one.run].answers[one.policy] for one in (first, second))
    return all(ours[id].text == theirs[id].text for id in ids)


def group_equal(
    contestants: Sequence[Contestant], runs: Sequence[RunAnswers], ids: Sequence[int]
) -> list[list[Contestant]]:
    """Return the policies, those with the same answers to all these questions together.

    Runs that share a stage share its answers: judging them against each other would cost verdicts and say
    nothing.
    """
    groups: list[list[Contestant]] = []
    for one in contestants:
        group = next((group for group in groups if are_equal(group[0], one, runs, ids)), None)
        if group is None:
            groups.append([one])
        else:
            group.append(one)
    return groups


def build_questions(
    contestants: Sequence[Contestant], runs: Sequence[RunAnswers], ids: Sequence[int], *, own_tokens: bool
) -> list[Question]:
    """Return the questions with the contestants' answers, as sampled tokens or as texts alone."""
    questions = []
    for id in ids:
        answers = {one.name: runs[one.run].answers[one.policy][id] for one in contestants}
        if not own_tokens:
            answers = {name: Answer(answer.text) for name, answer in answers.items()}
        questions.append(Question(id, runs[0].questions[id], answers, []))
    return questions
