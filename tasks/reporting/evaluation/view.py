"""Build what the report shows of judges and win rates: headline, leaderboard, comparisons, report cards."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.reporting import charts
from tasks.reporting.evaluation.headline import choose_headline
from tasks.reporting.evaluation.judges import build_judge
from tasks.reporting.evaluation.leaderboard import build_standings
from tasks.reporting.evaluation.policies import Rate
from tasks.reporting.numbers import format_interval
from tasks.reporting.reward_charts import Bar

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


def build_evaluation(
    metrics: Mapping[str, Mapping[str, Any]],
    results: Mapping[str, Any],
    judged_on: Mapping[str, str],
    warnings: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Return judges with comparisons and cards, the leaderboard of the first, accuracies and the headline.

    ``metrics`` and ``warnings`` are those of each stage, ``results`` are results.json of the stage winrate.
    """
    all_metrics = {name: value for stage in metrics.values() for name, value in stage.items()}
    judges = [build_judge(judge, all_metrics, results["tallies"]) for judge in results["judges"]]
    judges = [judge for judge in judges if judge["rows"]]
    accuracies = []
    for name, (title, about) in ACCURACIES.items():
        if name in all_metrics:
            note = f"{about} {judged_on.get(name, '')}".strip()
            accuracies.append(_build_accuracy_bar(title, note, all_metrics[name]))
    return {
        "judges": judges,
        "accuracies": accuracies,
        "standings": build_standings(judges, results["leaderboard"], all_metrics, warnings),
        "headline": choose_headline(judges),
    }


def _build_accuracy_bar(title: str, about: str, rate: Rate) -> Bar:
    bar = charts.draw_share_bar(
        [("s0", rate["value"])],
        value=rate["value"],
        low=rate["low"],
        high=rate["high"],
        title=f"{title}: {format_interval(rate)}",
    )
    return Bar(title, about, rate, bar)
