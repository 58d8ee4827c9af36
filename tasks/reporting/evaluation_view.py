"""Build what the report shows of judges and win rates: comparisons, leaderboard, report cards."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from markupsafe import Markup

from tasks.reporting import charts
from tasks.reporting.numbers import format_interval, format_percent
from tasks.reporting.reward_charts import Bar

NAMES = {
    "chosen": "chosen answers",
    "base": "base model",
    "sft": "SFT",
    "champion": "champion",
    "dpo": "DPO",
    "ppo": "PPO",
}
# opponents: the model that all started from first, the chosen answers last
OPPONENTS = ("sft", "champion", "dpo", "ppo", "base", "chosen")
POLICIES = ("ppo", "dpo", "champion", "sft", "base")
ACCURACIES = {
    "reward_accuracy.votes": ("Reward model, votes", "Pairs of answers ordered as the voters did,"),
    "reward_accuracy.longer_wins": (
        "Baseline: the longer answer wins",
        "What a reward model must beat on the same pairs.",
    ),
    "reward_accuracy.gold": (
        "Reward model, gold scorer",
        "Pairs of evaluation answers ordered as the gold scorer does.",
    ),
    "dpo.implicit_accuracy": ("DPO's implicit reward, votes", "The policy itself used as a judge,"),
}

Rate = Mapping[str, Any]  # value, low, high and n of a share


class Comparison(TypedDict):
    """The comparisons of two policies by one judge."""

    ours: str
    theirs: str
    rate: Rate
    tally: Mapping[str, int]  # wins, ties, losses, unparseable, flipped
    verdict: str
    bar: Markup


class Card(TypedDict):
    """A judge's report card: how it decided held-out pairs that voters have ordered."""

    worth: str  # one sentence
    agreement: Rate
    equal_length: Rate | None
    kappa: Rate | None
    longer_wins: Rate
    consistency: Rate
    length_pull: Rate | None
    unparseable: float


class Judge(TypedDict):
    """A judge with its comparisons."""

    name: str
    about: str
    by: str
    rows: list[Comparison]
    card: Card | None


class Standing(TypedDict):
    """A policy's line on the leaderboard."""

    name: str
    elo: float
    first: float  # probability of the first rank
    rate: Rate | None  # win rate against the SFT model
    at_equal_length: Rate | None
    score: float | None
    kl: Rate | None
    tokens: float | None
    ended: float | None


class Headline(TypedDict):
    """The comparison that the page's title is about."""

    judge: Judge
    best: Comparison
    rows: list[Comparison]


def build_evaluation(
    metrics: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any], judged_on: Mapping[str, str]
) -> dict[str, Any]:
    """Return judges with comparisons and cards, the leaderboard of the first, accuracies and the headline.

    ``metrics`` are those of each stage, ``results`` are results.json of the stage winrate.
    """
    all_metrics = {name: value for stage in metrics.values() for name, value in stage.items()}
    judges = [_build_judge(judge, all_metrics, results["tallies"]) for judge in results["judges"]]
    judges = [judge for judge in judges if judge["rows"]]
    accuracies = []
    for name, (title, about) in ACCURACIES.items():
        if name in all_metrics:
            note = f"{about} {judged_on.get(name, '')}".strip()
            accuracies.append(_build_accuracy_bar(title, note, all_metrics[name]))
    return {
        "judges": judges,
        "accuracies": accuracies,
        "standings": _build_standings(judges, results, all_metrics),
        "headline": _choose_headline(judges),
    }


def _build_judge(
    judge: Mapping[str, str], metrics: Mapping[str, Any], tallies: Mapping[str, Mapping[str, int]]
) -> Judge:
    by = judge["name"]
    rows = _build_comparisons(by, metrics, tallies)
    card = _build_card(judge, metrics)
    return {
        "name": judge["title"].removeprefix("the "),
        "about": judge["about"],
        "by": by,
        "rows": rows,
        "card": card,
    }


def _build_card(judge: Mapping[str, str], metrics: Mapping[str, Any]) -> Card | None:
    name = f"judge.{judge['name']}"
    if f"{name}.agreement" not in metrics:
        return None
    return {
        "worth": judge["worth"],
        "agreement": metrics[f"{name}.agreement"],
        "equal_length": metrics.get(f"{name}.equal_length"),
        "kappa": metrics.get(f"{name}.kappa"),
        "longer_wins": metrics[f"{name}.longer_wins"],
        "consistency": metrics[f"{name}.consistency"],
        "length_pull": metrics.get(f"{name}.length_pull"),
        "unparseable": metrics[f"{name}.unparseable"],
    }


def _build_comparisons(
    by: str, metrics: Mapping[str, Any], tallies: Mapping[str, Mapping[str, int]]
) -> list[Comparison]:
    rows: list[Comparison] = []
    for name, rate in metrics.items():
        if match := re.fullmatch(rf"{re.escape(by)}_win_rate\.(\w+)_vs_(\w+)", name):
            ours, theirs = match.groups()
            tally = tallies[f"{by}.{ours}_vs_{theirs}"]
            rows.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "rate": rate,
                    "tally": tally,
                    "verdict": describe_result(rate),
                    "bar": _draw_comparison_bar(ours, theirs, rate, tally),
                }
            )
    return sorted(rows, key=lambda row: (OPPONENTS.index(row["theirs"]), POLICIES.index(row["ours"])))


def describe_result(rate: Rate) -> str:
    """Return 'beats', 'loses to', or 'is level with' if the interval contains one half."""
    if rate["low"] > 0.5:
        return "beats"
    return "loses to" if rate["high"] < 0.5 else "is level with"


def _draw_comparison_bar(ours: str, theirs: str, rate: Rate, tally: Mapping[str, int]) -> Markup:
    total = sum(tally[name] for name in ("wins", "ties", "losses")) or 1
    parts = [
        (f"p-{ours}", tally["wins"] / total),
        ("tie", tally["ties"] / total),
        (f"p-{theirs}", tally["losses"] / total),
    ]
    names = f"{NAMES.get(ours, ours)} against {NAMES.get(theirs, theirs)}"
    title = f"{names}: {format_percent(rate['value'])} ({format_interval(rate)})"
    return charts.draw_share_bar(parts, value=rate["value"], low=rate["low"], high=rate["high"], title=title)


def _build_accuracy_bar(title: str, about: str, rate: Rate) -> Bar:
    bar = charts.draw_share_bar(
        [("s0", rate["value"])],
        value=rate["value"],
        low=rate["low"],
        high=rate["high"],
        title=f"{title}: {format_interval(rate)}",
    )
    return Bar(title, about, rate, bar)


def _build_standings(
    judges: Sequence[Judge], results: Mapping[str, Any], metrics: Mapping[str, Any]
) -> list[Standing]:
    """Return the leaderboard of the most trustworthy judge, the best policy first."""
    if not judges:
        return []
    by = judges[0]["by"]
    return [_build_standing(row, by, metrics) for row in results["leaderboard"][by]]


def _build_standing(row: Mapping[str, Any], by: str, metrics: Mapping[str, Any]) -> Standing:
    name = row["policy"]
    return {
        "name": name,
        "elo": row["elo"],
        "first": row["ranks"][0],
        "rate": _against_sft(f"{by}_win_rate", name, metrics),
        "at_equal_length": _against_sft(f"{by}_win_rate_at_equal_length", name, metrics),
        "score": metrics.get(f"{by}_score.{name}"),
        "kl": metrics.get(f"{name}.kl"),
        "tokens": metrics.get(f"{name}.length"),
        "ended": metrics.get(f"{name}.ended"),
    }


def _against_sft(metric: str, policy: str, metrics: Mapping[str, Any]) -> Rate | None:
    """Return a policy's win rate against the SFT model, whichever of the two was counted as the first."""
    if (rate := metrics.get(f"{metric}.{policy}_vs_sft")) is not None:
        return dict(rate)
    if (rate := metrics.get(f"{metric}.sft_vs_{policy}")) is None:
        return None
    return {"value": 1 - rate["value"], "low": 1 - rate["high"], "high": 1 - rate["low"], "n": rate["n"]}


def _choose_headline(judges: Sequence[Judge]) -> Headline | None:
    """Return the best trained policy against SFT, by the most trustworthy judge.

    Without a trained policy, SFT against the chosen answers.
    """
    if not judges:
        return None
    rows = judges[0]["rows"]
    trained = [row for row in rows if row["theirs"] == "sft"] or rows
    best = max(trained, key=lambda row: row["rate"]["value"])
    return {"judge": judges[0], "best": best, "rows": [row for row in rows if row["ours"] == best["ours"]]}
