"""Collect what a run has measured of one policy, and give it the form of the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from tasks.reporting.benchmark_tables import LOWER_IS_BETTER
from tasks.reporting.evaluation.headline import describe_doubt
from tasks.reporting.evaluation.judges import Comparison, Judge
from tasks.reporting.evaluation.policies import Rate, with_article

TASK = "text-generation"
DECIMALS = 4


class Win(NamedTuple):
    """The win rate of a policy against an opponent, by one judge."""

    opponent: str
    rate: Rate
    judge: str
    doubt: str  # why the judge's verdict does not count; "" if it does


class Measure(NamedTuple):
    """A perplexity or an accuracy of a policy, and what it has lost against other models."""

    name: str  # of the benchmark
    measure: str
    value: Rate
    losses: list[tuple[str, Mapping[str, Any], bool]]  # opponent, loss, whether it is shown

    @property
    def title(self) -> str:
        """Return what was measured."""
        return LOWER_IS_BETTER.get(self.measure) or f"{self.name}, {self.measure}"


def collect_wins(policy: str, judges: Sequence[Judge]) -> list[Win]:
    """Return the policy's win rates against every opponent, by every judge."""
    return [
        Win(opponent, rate, f"the {judge['name']}", describe_doubt(judge, policy))
        for judge in judges
        for row in judge["rows"]
        for opponent, rate in _seen_by(policy, row)
    ]


def _seen_by(policy: str, row: Comparison) -> list[tuple[str, Rate]]:
    """Return opponent and win rate of a comparison that the policy takes part in."""
    rate = row["rate"]
    if row["ours"] == policy:
        return [(row["theirs"], rate)]
    if row["theirs"] != policy:
        return []
    turned = {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"], "n": rate["n"]}
    return [(row["ours"], turned)]


def collect_measures(policy: str, rows: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Return the policy's figures of the stage benchmarks; ``rows`` are those of its results.json."""
    return [
        Measure(
            row["name"],
            row["measure"],
            row["values"][policy],
            [
                (tax["theirs"], tax["estimate"], bool(tax["is_shown"]))
                for tax in row["taxes"]
                if tax["ours"] == policy
            ],
        )
        for row in rows
        if policy in row["values"]
    ]


def as_eval_results(wins: Sequence[Win], measures: Sequence[Measure], *, site: str) -> list[EvalResult]:
    """Return the results as entries of the card's model-index. A doubted judge's are left out: there no
    sentence beside the figure says what it is worth.
    """
    rates = [
        _build_result(
            ("held-out", f"Held-out questions of {site}"),
            ("win_rate", f"Win rate against {with_article(win.opponent)}, judged by {win.judge}"),
            win.rate,
        )
        for win in wins
        if not win.doubt
    ]
    texts = ("held-out-answers", f"Held-out answers of {site}")
    figures = [
        _build_result(
            texts if one.measure in LOWER_IS_BETTER else (one.name, one.name),
            (one.measure, one.title),
            one.value,
        )
        for one in measures
    ]
    return [*rates, *figures]


def _build_result(data: tuple[str, str], metric: tuple[str, str], value: Rate) -> EvalResult:
    """Return one entry; ``data`` and ``metric`` are a type and a name."""
    return EvalResult(
        task_type=TASK,
        dataset_type=data[0],
        dataset_name=data[1],
        metric_type=metric[0],
        metric_name=metric[1],
        metric_value=round(value["value"], DECIMALS),
        metric_args=_interval(value),
    )


def _interval(rate: Rate) -> dict[str, Any]:
    return {"low": round(rate["low"], DECIMALS), "high": round(rate["high"], DECIMALS), "n": rate["n"]}
