"""Compare figures of two runs on the same questions, with paired intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import pyarrow.parquet as pq
import torch

from tasks.config.commands.comparison import ComparedRun
from tasks.config.policies import TRAINED
from tasks.config.trusted_judges import choose_judge
from tasks.programs.comparison.run_answers import Contestant, RunAnswers, are_equal, shared_questions
from tasks.programs.comparison.standings import LETTERS, Estimate, join_names, title
from tasks.rlhf.evaluation import perplexity
from tasks.rlhf.evaluation.intervals import Interval
from tasks.rlhf.judging.paired import paired_difference

LEAST = 2  # questions of a difference with an interval


class Difference(TypedDict):
    """A figure of a policy of one run less that of the same policy of another, on the same questions."""

    first: str  # letters of the runs
    second: str
    policy: str
    figure: str
    unit: str
    estimate: Estimate
    verdict: str  # higher, lower or not shown


class Tables(NamedTuple):
    """What is known of single questions of one run; verdicts and losses are None if their stage failed."""

    run: ComparedRun
    answers: RunAnswers
    verdicts: dict[tuple[str, str], dict[int, float | None]] | None  # outcome by judge and policy, by id
    losses: dict[str, list[Any]] | None  # columns of perplexity.parquet


def read_verdicts(folder: Path) -> dict[tuple[str, str], dict[int, float | None]]:
    """Read the outcomes of each policy against SFT, by judge and policy, from an artifact of winrate."""
    names = ["judge", "ours", "theirs", "question_id", "outcome"]
    found: dict[tuple[str, str], dict[int, float | None]] = {}
    for row in pq.read_table(folder / "verdicts.parquet", columns=names).to_pylist():
        if row["theirs"] == "sft":
            found.setdefault((row["judge"], row["ours"]), {})[row["question_id"]] = row["outcome"]
    return found


def compare_runs(first: int, second: int, tables: Sequence[Tables]) -> list[Difference]:
    """Return the differences of two runs' policies on the questions that both have answered.

    A policy that answers alike in both runs is the same one, and has none.
    """
    ours, theirs = tables[first], tables[second]
    answers = [table.answers for table in tables]
    ids = shared_questions([ours.answers, theirs.answers])
    found: list[Difference] = []
    for policy in TRAINED:
        is_in_both = policy in ours.run.policies and policy in theirs.run.policies
        if not is_in_both or are_equal(Contestant(first, policy), Contestant(second, policy), answers, ids):
            continue
        for (figure, unit), one in _estimate(policy, ours, theirs, ids).items():
            if one is not None:
                found.append(
                    Difference(
                        first=LETTERS[first],
                        second=LETTERS[second],
                        policy=policy,
                        figure=figure,
                        unit=unit,
                        estimate=one._asdict(),
                        verdict=_decide(one),
                    )
                )
    return found


def _estimate(
    policy: str, ours: Tables, theirs: Tables, ids: Sequence[int]
) -> dict[tuple[str, str], Interval | None]:
    """Return each figure's difference; None if it cannot be paired."""
    return {
        ("win rate against SFT", "points"): _win_rates(policy, ours, theirs, ids),
        ("KL from SFT", "nats"): _pair(ours.answers.kl[policy], theirs.answers.kl[policy], ids),
        ("length", "characters"): _pair(_lengths(policy, ours), _lengths(policy, theirs), ids),
        ("perplexity", "per cent"): _perplexities(policy, ours.losses, theirs.losses),
    }


def _lengths(policy: str, table: Tables) -> dict[int, float | None]:
    return {id: float(len(answer.text)) for id, answer in table.answers.answers[policy].items()}


def _win_rates(policy: str, ours: Tables, theirs: Tables, ids: Sequence[int]) -> Interval | None:
    """Return the difference in points of the win rates against SFT, by a judge that both runs have."""
    judge = choose_judge(ours.run.metrics)
    first, second = ((table.verdicts or {}).get((judge, policy)) for table in (ours, theirs))
    is_same = ours.run.judges.get(judge) == theirs.run.judges.get(judge)
    if not is_same or first is None or second is None:
        return None
    found = _pair(first, second, ids)
    return found and Interval(100 * found.value, 100 * found.low, 100 * found.high, found.n)


def _pair(
    first: Mapping[int, float | None], second: Mapping[int, float | None], ids: Sequence[int]
) -> Interval | None:
    """Return the mean difference over the questions for which both are known."""
    pairs = [(first.get(id), second.get(id)) for id in ids]
    known = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
    return paired_difference(known[:, 0], known[:, 1]) if len(known) >= LEAST else None


def _perplexities(
    policy: str, first: dict[str, list[Any]] | None, second: dict[str, list[Any]] | None
) -> Interval | None:
    """Return by how many per cent the first is higher, if both were measured on the same tokens."""
    if not first or not second or policy not in first or policy not in second:
        return None
    is_same = all(first[name] == second[name] for name in ("question_id", "tokens", "bytes"))
    if not is_same or len(first["tokens"]) < LEAST:
        return None
    columns = (first[policy], second[policy], first["tokens"])
    return perplexity.perplexity_increase(*(torch.tensor(one, dtype=torch.float64) for one in columns))


def _decide(difference: Interval) -> str:
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "not shown"


def describe_differences(found: Sequence[Difference]) -> list[str]:
    """Return a sentence for each pair of policies that says what is shown and what is not."""
    pairs = dict.fromkeys((one["first"], one["second"], one["policy"]) for one in found)
    return [
        _describe_pair([one for one in found if (one["first"], one["second"], one["policy"]) == pair])
        for pair in pairs
    ]


def _describe_pair(found: Sequence[Difference]) -> str:
    one = found[0]
    ours, theirs = (
        title(Contestant(LETTERS.index(letter), one["policy"])) for letter in (one["first"], one["second"])
    )
    said = []
    for verdict in ("higher", "lower", "not shown"):
        figures = [other["figure"] for other in found if other["verdict"] == verdict]
        if figures:
            shown = "not shown to differ" if verdict == "not shown" else f"shown to be {verdict}"
            said.append(f"{join_names(figures)} {shown}")
    return f"{ours} against {theirs}, on the same questions: {'; '.join(said)}."
