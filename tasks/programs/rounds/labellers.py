"""Label pairs by the gold scorer with planted mistakes, or by a judge."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tasks.demo_site.gold import gold_score
from tasks.judges.judge import Answer, Battle, Judge
from tasks.programs.rounds.hashed_number import hashed_number
from tasks.programs.rounds.label_rows import OTHER_SIDE, LabelRow, label_id
from tasks.programs.runtime.battles import compare_in_both_orders, in_both_orders
from tasks.programs.runtime.job_judges import refuse_unaffordable
from tasks.programs.runtime.program import Run
from tasks.rlhf.judging.verdicts import resolve

Pair = Mapping[str, Any]  # a row of the table asked
OUTCOMES = {1.0: "first", 0.5: "tie", 0.0: "second"}


def gold_labels(asked: Sequence[Pair], *, noise: float, tie: float, seed: int) -> list[LabelRow]:
    """Return the gold scorer's verdicts, each turned round with the probability ``noise``.

    Answers whose scores differ by at most ``tie`` points tie, which noise does not change. Which verdicts are
    turned depends on the seed and each pair alone.
    """
    found = []
    for pair in asked:
        verdict = gold_verdict(pair, tie=tie)
        if hashed_number("gold noise", seed, pair["pair_id"]) < noise:
            verdict = OTHER_SIDE.get(verdict, verdict)
        found.append(LabelRow(label_id(pair["pair_id"], "gold"), pair["pair_id"], verdict, "gold", "gold"))
    return found


def gold_verdict(pair: Pair, *, tie: float = 0.0) -> str:
    """Return the answer that the gold scorer prefers, or "tie"."""
    difference = gold_score(pair["prompt"], pair["first"]) - gold_score(pair["prompt"], pair["second"])
    if abs(difference) <= tie:
        return "tie"
    return "first" if difference > 0 else "second"


def judge_labels(judge: Judge, asked: Sequence[Pair], run: Run) -> list[LabelRow]:
    """Return a judge's verdicts over both orders: one that flips with the order is a tie, one that cannot be
    read is skipped.

    Raises InputError if they would cost more than the settings allow.
    """
    battles = [Battle(pair["prompt"], Answer(pair["first"]), Answer(pair["second"])) for pair in asked]
    refuse_unaffordable(judge, in_both_orders(battles))
    outcomes = resolve(*compare_in_both_orders(judge, battles, run, f"labelling by {judge.name}")).outcomes
    found = []
    for pair, outcome in zip(asked, outcomes.tolist(), strict=True):
        verdict = "skip" if np.isnan(outcome) else OUTCOMES[outcome]
        name, source = label_id(pair["pair_id"], judge.name), f"judge:{judge.name}"
        found.append(LabelRow(name, pair["pair_id"], verdict, judge.name, source))
    return found
