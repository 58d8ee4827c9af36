"""Name the runs and policies of a comparison, and list how each run has measured its policies."""

from collections.abc import Sequence
from typing import Any, TypedDict

from tasks.config.commands.comparison import ComparedRun
from tasks.config.policies import TITLES, TRAINED
from tasks.config.trusted_judges import choose_judge, is_trusted
from tasks.programs.comparison.run_answers import Contestant, RunAnswers, are_equal, shared_questions

Estimate = dict[str, Any]  # value, low, high and n
NAMES = TITLES | {"base": "base model"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # by which sentences and tables name the runs


class Row(TypedDict):
    """What a run's own evaluation says of one of its policies."""

    run: str  # its letter
    policy: str
    judge: str  # "" if none has judged it
    agreement: Estimate | None  # of the judge with held-out votes
    is_trusted: bool
    rate: Estimate | None  # win rate against the run's own SFT model
    at_equal_length: Estimate | None
    kl: Estimate | None  # nats an answer
    perplexity_tax: Estimate | None  # per cent, against SFT
    worst_attack: Estimate | None
    warnings: int


def title(one: Contestant) -> str:
    """Return a policy's name in a sentence: "PPO of A"."""
    return f"{NAMES[one.policy]} of {LETTERS[one.run]}"


def join_names(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: "A, B and C"."""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [names[-1]])


def build_rows(runs: Sequence[ComparedRun]) -> list[Row]:
    """Return a line for each trained policy of each run, the highest win rate against SFT first."""
    rows = [
        _build_row(Contestant(number, policy), run)
        for number, run in enumerate(runs)
        for policy in TRAINED
        if policy in run.policies
    ]
    return sorted(rows, key=lambda row: -row["rate"]["value"] if row["rate"] else 1.0)


def _build_row(one: Contestant, run: ComparedRun) -> Row:
    metrics, policy = run.metrics, one.policy
    judge = choose_judge(metrics)
    return {
        "run": LETTERS[one.run],
        "policy": policy,
        "judge": judge,
        "agreement": metrics.get(f"judge.{judge}.agreement"),
        "is_trusted": is_trusted(judge, metrics),
        "rate": metrics.get(f"{judge}_win_rate.{policy}_vs_sft"),
        "at_equal_length": metrics.get(f"{judge}_win_rate_at_equal_length.{policy}_vs_sft"),
        "kl": metrics.get(f"{policy}.kl"),
        "perplexity_tax": metrics.get(f"tax.perplexity.{policy}_vs_sft"),
        "worst_attack": metrics.get("reward.worst_attack"),
        "warnings": len(run.warnings),
    }


def describe_terms(runs: Sequence[ComparedRun], answers: Sequence[RunAnswers]) -> list[str]:
    """Return sentences on how far the runs' own figures can be compared."""
    said, ids = [], shared_questions(answers)
    counts = sorted({len(run.questions) for run in answers})
    if not ids:
        said.append("The runs share no question, so their figures are of different questions.")
    elif counts == [len(ids)]:
        said.append(f"All runs answered the same {len(ids):,} questions.")
    else:
        said.append(f"The runs share {len(ids):,} questions of {' and '.join(f'{n:,}' for n in counts)}.")
    if len({run.judges.get(choose_judge(run.metrics)) for run in runs}) > 1:
        said.append(
            "Different judges judged the runs, so their win rates cannot be set against each other: one "
            "judge for all does that (--judge)."
        )
    has_sft = ids and all("sft" in run.answers for run in answers)
    sfts = [Contestant(number, "sft") for number in range(len(runs))]
    if has_sft and not all(are_equal(sfts[0], one, answers, ids) for one in sfts):
        said.append("Each win rate is against the run's own SFT model, and these differ between the runs.")
    return said
