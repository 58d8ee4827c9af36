"""Build the report's leaderboard: what each policy wins, and what it costs."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from tasks.reporting.evaluation.judges import Judge
from tasks.reporting.evaluation.policies import Rate

STAGES = {"base": "pretrain"}  # of a policy, where the names differ


class Standing(TypedDict):
    """A policy's line on the leaderboard."""

    name: str
    elo: float
    first: float  # probability of the first rank
    rate: Rate | None  # win rate against the SFT model
    at_equal_length: Rate | None
    against_champion: Rate | None
    score: float | None
    kl: Rate | None
    tokens: float | None
    ended: float | None
    num_warnings: int | None  # of the policy's own training; None: it was not trained in this run


def build_standings(
    judges: Sequence[Judge],
    leaderboards: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, Any],
    warnings: Mapping[str, Sequence[str]],
) -> list[Standing]:
    """Return the leaderboard of the most trustworthy judge, the best policy first.

    ``metrics`` are those of all stages, ``warnings`` are sentences by stage.
    """
    if not judges:
        return []
    by = judges[0]["by"]
    return [_build_standing(row, by, metrics, warnings) for row in leaderboards[by]]


def _build_standing(
    row: Mapping[str, Any], by: str, metrics: Mapping[str, Any], warnings: Mapping[str, Sequence[str]]
) -> Standing:
    name = row["policy"]
    raised = warnings.get(STAGES.get(name, name))
    return {
        "name": name,
        "elo": row["elo"],
        "first": row["ranks"][0],
        "rate": _against("sft", f"{by}_win_rate", name, metrics),
        "at_equal_length": _against("sft", f"{by}_win_rate_at_equal_length", name, metrics),
        "against_champion": _against("champion", f"{by}_win_rate", name, metrics),
        "score": metrics.get(f"{by}_score.{name}"),
        "kl": metrics.get(f"{name}.kl"),
        "tokens": metrics.get(f"{name}.length"),
        "ended": metrics.get(f"{name}.ended"),
        "num_warnings": None if raised is None else len(raised),
    }


def _against(opponent: str, metric: str, policy: str, metrics: Mapping[str, Any]) -> Rate | None:
    """Return a policy's win rate against an opponent, whichever of the two was counted as the first."""
    if (rate := metrics.get(f"{metric}.{policy}_vs_{opponent}")) is not None:
        return dict(rate)
    if (rate := metrics.get(f"{metric}.{opponent}_vs_{policy}")) is None:
        return None
    return {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"], "n": rate["n"]}
