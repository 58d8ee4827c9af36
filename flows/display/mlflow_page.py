"""Say on MLflow's page of a run what came out: headline metrics, tags, and a description in Markdown."""

from collections.abc import Mapping
from typing import Any

from flows.display.formatting import format_metric
from flows.display.run_end import describe_end
from tasks.config.pipeline import Pipeline
from tasks.config.policies import TITLES, TRAINED
from tasks.config.trusted_judges import choose_judge
from tasks.tracking.logged_models import log_results
from tasks.tracking.run_notes import escape, pipeline_facts, quote_facts
from tasks.tracking.run_origin import NOTE
from tasks.tracking.saved_views import HEADLINE, view_path
from tasks.tracking.tracked_run import TrackedRun

MAX_WARNINGS = 5
MAX_NOTE = 4500  # characters; MLflow's databases take 5000 of a tag
COLUMNS = {
    "wins against SFT": "{judge}_win_rate.{policy}_vs_sft",
    "at equal length": "{judge}_win_rate_at_equal_length.{policy}_vs_sft",
    "wins against the base": "{judge}_win_rate.{policy}_vs_base",
    "wins against the champion": "{judge}_win_rate.{policy}_vs_champion",
    "wins against the earlier round": "{judge}_win_rate.{policy}_vs_predecessor",
    "KL from SFT, nats": "{policy}.kl",
    "perplexity tax, %": "tax.perplexity.{policy}_vs_sft",
}
RESULTS = {
    "win_rate_vs_sft": "{judge}_win_rate.{policy}_vs_sft",
    "win_rate_vs_base": "{judge}_win_rate.{policy}_vs_base",
    "win_rate_vs_champion": "{judge}_win_rate.{policy}_vs_champion",
    "win_rate_vs_predecessor": "{judge}_win_rate.{policy}_vs_predecessor",
    "kl": "{policy}.kl",
    "length": "{policy}.length",
    "perplexity_tax": "tax.perplexity.{policy}_vs_sft",
}
JUDGES = {
    "gold": "the gold scorer",
    "lm": "a language model",
    "held_out": "a reward model that PPO has never seen",
    "reward": "the reward model, which PPO was trained to please",
}
FACTS = {
    "Judge's agreement with held-out votes": "judge.{judge}.agreement",
    "The same of the rule that the longer answer wins": "judge.{judge}.longer_wins",
    "Reward model's accuracy on held-out votes": "reward_accuracy.votes",
    "Real answers that the worst attack on it out-scores": "reward.worst_attack",
}


def show_result(
    summary: dict[str, Any], config: Pipeline, tracked: TrackedRun, files: dict[str, str]
) -> None:
    """Log the figures of a finished run, the headline first, and describe it, if it is tracked.

    ``files`` of it are linked, by their titles.
    """
    if not tracked.is_on:
        return
    metrics = summary["metrics"]
    tracked.log_metrics(headline_metrics(metrics))
    tracked.log_summary({**metrics, "seconds": summary["seconds"]})
    for stage in summary["stages"]:
        if stage["name"] in TRAINED:
            log_results(tracked.tracker, stage["key"], policy_results(metrics, stage["name"]))
    facts = pipeline_facts(summary["profile"], config.model_dump(mode="json"))
    tracked.set_tags(result_tags(summary, facts, links(tracked, files)))


def headline_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the few figures that a run is judged by, under names that MLflow shows first.

    The win rates are those against SFT, by the judge that is trusted most. They come first: MLflow's page
    that compares runs draws the first metric.
    """
    judge = choose_judge(metrics)
    chosen: dict[str, float | None] = {}
    for policy in TRAINED:
        rate = metrics.get(f"{judge}_win_rate.{policy}_vs_sft")
        chosen[f"{policy}_win_rate"] = _number(rate)
        for end in ("low", "high"):
            chosen[f"{policy}_win_rate.{end}"] = rate.get(end) if isinstance(rate, dict) else None
        chosen[f"{policy}_kl"] = _number(metrics.get(f"{policy}.kl"))
        chosen[f"{policy}_perplexity_tax"] = _number(metrics.get(f"tax.perplexity.{policy}_vs_sft"))
    chosen["judge_agreement"] = _number(metrics.get(f"judge.{judge}.agreement"))
    chosen["reward_accuracy"] = _number(metrics.get("reward_accuracy.votes"))
    chosen["worst_attack"] = _number(metrics.get("reward.worst_attack"))
    return {f"{HEADLINE}/{name}": float(value) for name, value in chosen.items() if value is not None}


def _number(figure: Any) -> float | None:
    value = figure.get("value") if isinstance(figure, dict) else figure
    return float(value) if isinstance(value, int | float) else None


def policy_results(metrics: Mapping[str, Any], policy: str) -> dict[str, float]:
    """Return the figures of a policy under names that are the same for all, to compare models by."""
    judge = choose_judge(metrics)
    chosen = {title: metrics.get(name.format(judge=judge, policy=policy)) for title, name in RESULTS.items()}
    numbers = {f"eval/policy/{title}": _number(figure) for title, figure in chosen.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def result_tags(summary: dict[str, Any], facts: dict[str, Any], pages: str) -> dict[str, str]:
    """Return the tags of a finished run: its judge, its result in a sentence, and its description.

    ``facts`` are what the run is, by their titles.
    """
    tags = {"judge": choose_judge(summary["metrics"]), "result": summary["headline"]}
    note = describe_result(summary, pages, facts)[:MAX_NOTE]
    return {name: text for name, text in tags.items() if text} | {NOTE: note}


def links(tracked: TrackedRun, files: dict[str, str]) -> str:
    """Return links from a run's page in MLflow to its files and to the table of all runs."""
    tracker = tracked.tracker
    pages = {title: tracker.page_path(str(tracked.run_id), file) for title, file in files.items()}
    pages["All runs"] = view_path(tracker)
    return " · ".join(f"[{title}]({address})" for title, address in pages.items())


def describe_result(summary: dict[str, Any], pages: str, facts: dict[str, Any]) -> str:
    """Return the description of a finished run in Markdown: what came out, what to beware of, what it is."""
    metrics = summary["metrics"]
    judge = choose_judge(metrics)
    result = escape(describe_end(summary))
    found = {title: metrics.get(name.format(judge=judge)) for title, name in FACTS.items()}
    figures = [f"- {title}: {_cell(value)}" for title, value in found.items() if value is not None]
    warnings = [
        f"- {stage['name']}: {escape(text)}" for stage in summary["stages"] for text in stage["warnings"]
    ]
    if len(warnings) > MAX_WARNINGS:
        warnings[MAX_WARNINGS:] = [f"- and {len(warnings) - MAX_WARNINGS} more, in the report"]
    parts = {
        "Failed": [f"- {escape(text)}" for text in summary["failed"].values()],
        "": _policy_table(metrics, judge),
        "How far to trust it": figures,
        "Warnings": warnings,
        "What it is": [quote_facts(facts)],
    }
    text = f"**{result}**\n\n{pages}\n"
    for title, lines in parts.items():
        heading = [f"**{title}**", ""] if title else []
        text += "\n".join(["", *heading, *lines, ""]) if lines else ""
    return text


def _policy_table(metrics: Mapping[str, Any], judge: str) -> list[str]:
    """Return a row for each policy that was compared; nothing without a judge."""
    compared = [policy for policy in TRAINED if f"{judge}_win_rate.{policy}_vs_sft" in metrics]
    if not compared:
        return []
    columns = {
        title: [metrics.get(name.format(judge=judge, policy=policy)) for policy in compared]
        for title, name in COLUMNS.items()
    }
    shown = {title: figures for title, figures in columns.items() if any(figures)}
    lines = [f"Judged by {JUDGES[judge]}:", "", _row(["policy", *shown]), "|---" * (1 + len(shown)) + "|"]
    rows = zip(compared, *shown.values(), strict=True)
    return [*lines, *(_row([TITLES[policy], *map(_cell, figures)]) for policy, *figures in rows)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(figure: Any) -> str:
    """Return a figure with its interval as text, without the number of questions."""
    if isinstance(figure, dict):
        figure = {name: value for name, value in figure.items() if name != "n"}
    return "" if figure is None else format_metric(figure)
