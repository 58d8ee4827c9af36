"""Choose the pairs of sampled answers that are asked about in a round.

python -m tasks.programs.rounds.asked DIR

inputs: candidates; before1, before2, ... (what earlier rounds have asked); data, if gold questions are mixed
        in
artifact: asked.parquet (one row a pair, in the order in which it is asked), summary.json

No pair is asked twice, in whatever round. Duplicates and near-duplicates of an answer count as one answer.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tasks.config.jobs import AskedJob
from tasks.programs.rounds.choose_pairs import Pair, choose, decided, disagreement, pair_id, pair_up
from tasks.programs.rounds.hashed_number import hashed_number
from tasks.programs.rounds.round_tables import ASKED, write_rows
from tasks.programs.runtime.program import Run, main
from tasks.system.errors import InputError

CANDIDATE_COLUMNS = ["question_id", "prompt", "messages", "policy", "draw", "answer", "rewards", "reward"]
GOLD_QUESTION = "gold question"


def ask(job: AskedJob, run: Run) -> None:
    """Choose the pairs of a round, and mix gold questions in."""
    # 1. All pairs of answers that differ, without those that an earlier round has asked. A killed program
    # starts over.
    run.rewind(0)
    rows = pq.read_table(run.inputs["candidates"] / "candidates.parquet", columns=CANDIDATE_COLUMNS)
    pairs = pair_up(rows.to_pylist(), alike=job.choose.alike)
    before = [*read_before(run)]
    asked_before = {row["pair_id"] for row in before}
    new = [pair for pair in pairs if pair.pair_id not in asked_before]

    # 2. Where the members of the reward model disagree, if there are several.
    new, settled = measure_disagreement(new, confidence=job.choose.confidence)
    by = job.choose.by
    if by == "disagreement" and new and new[0].disagreement is None:
        run.warn(
            "There is no reward model with several members yet, whose disagreement would choose pairs: this "
            "round's are random."
        )
        by = "random"

    # 3. The budget.
    limit = job.choose.pairs_per_question
    chosen = choose(new, by=by, count=job.comparisons, per_question=limit, seed=job.seed)
    check_count(len(chosen), job, run)

    # 4. The artifact, with gold questions at places that are drawn.
    asked = [describe_pair(pair, by) for pair in chosen]
    gold = gold_questions(job, run, before) if job.gold_questions else []
    write_rows(run.artifact / "asked.parquet", mix_in(asked, gold, seed=job.seed), ASKED)
    metrics: dict[str, Any] = {
        "asked.comparisons": len(asked),
        "asked.gold_questions": len(gold),
        "asked.questions": len({pair.question_id for pair in chosen}),
        "asked.possible": len(new),
        "asked.asked_before": len(pairs) - len(new) - settled,
        "asked.settled": settled,
    }
    run.finish(metrics | mean_disagreements(chosen, new))


def read_before(run: Run) -> Iterator[dict[str, Any]]:
    """Yield pair_id, question_id and known of each pair that earlier rounds have asked."""
    for name, folder in run.inputs.items():
        if re.fullmatch(r"before\d+", name):
            table = pq.read_table(folder / "asked.parquet", columns=["pair_id", "question_id", "known"])
            yield from table.to_pylist()


def measure_disagreement(pairs: Sequence[Pair], *, confidence: float | None) -> tuple[list[Pair], int]:
    """Return the pairs with the disagreement of the reward model's members, and how many were left out.

    Those are left out that all members decide with this ``confidence``. Without members nothing changes; a
    single one has no disagreement.
    """
    if not pairs or not pairs[0].first["rewards"]:
        return list(pairs), 0
    first = np.array([pair.first["rewards"] for pair in pairs], dtype=np.float64)
    second = np.array([pair.second["rewards"] for pair in pairs], dtype=np.float64)
    found = list(pairs)
    if first.shape[1] > 1:
        values = disagreement(first, second).tolist()
        found = [pair._replace(disagreement=value) for pair, value in zip(pairs, values, strict=True)]
    if confidence is None:
        return found, 0
    settled = decided(first, second, confidence=confidence)
    return [pair for pair, is_settled in zip(found, settled, strict=True) if not is_settled], int(
        settled.sum()
    )


def check_count(count: int, job: AskedJob, run: Run) -> None:
    """Warn of a round that asks fewer pairs than its budget. Raises InputError if there is none."""
    remedy = "raise rounds.sample.prompts, rounds.sample.answers or rounds.choose.pairs_per_question"
    if not count:
        raise InputError(
            "No two sampled answers to a prompt differ enough to be compared, or all such pairs were asked "
            f"before: {remedy}, or rounds.choose.alike."
        )
    if count < job.comparisons:
        run.warn(f"Only {count:,} of rounds.comparisons={job.comparisons:,} pairs can be asked: {remedy}.")


def describe_pair(pair: Pair, chosen_by: str) -> dict[str, Any]:
    """Return the row of a pair."""
    return {
        "pair_id": pair.pair_id,
        "question_id": pair.question_id,
        "prompt": pair.prompt,
        "messages": pair.messages,
        "first": pair.first["answer"],
        "second": pair.second["answer"],
        "first_policy": pair.first["policy"],
        "second_policy": pair.second["policy"],
        "disagreement": pair.disagreement,
        "margin": pair.margin,
        "chosen_by": chosen_by,
        "known": "",
    }


def gold_questions(job: AskedJob, run: Run, before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return pairs of a question's best voted answer and the best answer to another question.

    Questions are drawn by the seed; none was a gold question of an earlier round. Warns if there are too few.
    """
    used = {row["question_id"] for row in before if row["known"]}
    table: Path = run.inputs["data"] / "finetune.parquet"
    names = ["question_id", "prompt", "messages", "answer"]
    present = [name for name in names if name in pq.read_schema(table).names]
    rows = [
        row for row in pq.read_table(table, columns=present).to_pylist() if row["question_id"] not in used
    ]
    rows.sort(key=lambda row: hashed_number("gold question", job.seed, row["question_id"]))
    found = [_gold_question(*both) for both in pairwise(rows) if both[0]["answer"] != both[1]["answer"]]
    if len(found) < job.gold_questions:
        run.warn(f"The fine-tuning split has questions for only {len(found)} new gold questions.")
    return found[: job.gold_questions]


def _gold_question(own: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    name = pair_id(own["prompt"], own["answer"], other["answer"])
    known = "first" if hashed_number("side", 0, name) < 0.5 else "second"
    answers = [own["answer"], other["answer"]][:: 1 if known == "first" else -1]
    policies = ["votes", "another question"][:: 1 if known == "first" else -1]
    return {
        "pair_id": name,
        "question_id": own["question_id"],
        "prompt": own["prompt"],
        "messages": own.get("messages"),
        "first": answers[0],
        "second": answers[1],
        "first_policy": policies[0],
        "second_policy": policies[1],
        "chosen_by": GOLD_QUESTION,
        "known": known,
    }


def mix_in(
    asked: Sequence[dict[str, Any]], gold: Sequence[dict[str, Any]], *, seed: int
) -> list[dict[str, Any]]:
    """Return the pairs in their order, with each gold question at a place that is drawn by its id."""
    placed = [((number + 0.5) / len(asked), row) for number, row in enumerate(asked)]
    placed += [(hashed_number("place", seed, row["pair_id"]), row) for row in gold]
    return [row for _, row in sorted(placed, key=lambda one: one[0])]


def mean_disagreements(chosen: Sequence[Pair], pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the mean disagreement of the chosen and of all pairs; nothing without an ensemble."""
    metrics = {}
    for name, some in (("asked.disagreement", chosen), ("asked.disagreement_of_all", pairs)):
        known = [pair.disagreement for pair in some if pair.disagreement is not None]
        if known:
            metrics[name] = float(np.mean(known))
    return metrics


if __name__ == "__main__":
    main(ask, AskedJob)
