"""The end of a run of rounds: a line for each round, and which of them is the best."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact

from flows.display.formatting import format_metric
from flows.display.progress import format_duration
from tasks.artifacts.store import home
from tasks.config.pipeline import Pipeline
from tasks.config.policies import PREDECESSOR
from tasks.rounds.round_walk import Round
from tasks.rounds.verdict import RoundVerdict
from tasks.system.files import replace_text
from tasks.tracking.client import Metric
from tasks.tracking.run_notes import escape, pipeline_facts, quote_facts
from tasks.tracking.run_origin import NOTE
from tasks.tracking.tracked_run import TrackedRun

FILE = "all-rounds.json"
NO_POLICY = "the first answers are those of the SFT model"
COLUMNS = {  # of the table of rounds: a line's entry by the column's title
    "asked": "asked",
    "pairs": "pairs",
    "reward accuracy": "reward_accuracy",
    "against the earlier round": "rate",
    "against SFT": "against_sft",
    "KL": "kl",
}
RATES = ("rate", "against_sft")  # entries that are shown with their interval


def summarise_round(one: Round, verdict: RoundVerdict, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return a round's line in the table of rounds; ``summary`` is that of its run."""
    metrics = one.metrics
    against_sft = metrics.get(f"{verdict.judge}_win_rate.ppo_vs_sft")
    said = verdict.sentence if one.policy else NO_POLICY
    return {
        "number": one.number,
        "outcome": verdict.outcome if one.policy else "",
        "sentence": f"{said}  ({format_duration(summary['seconds'])})",
        "judge": verdict.judge,
        "rate": verdict.rate if verdict.against == PREDECESSOR else None,
        "against_sft": against_sft,
        "asked": metrics.get("comparisons.asked"),
        "pairs": metrics.get("comparisons.pairs"),
        "reward_accuracy": metrics.get("reward_accuracy.votes"),
        "kl": metrics.get("ppo.kl"),
        "seconds": summary["seconds"],
        "run": one.run_id,
        "file": summary["file"],
        "policy": one.policy["key"] if one.policy else None,
        "warnings": [f"{stage['name']}: {text}" for stage in summary["stages"] for text in stage["warnings"]],
    }


def conclude_rounds(
    config: Pipeline,
    profile: str,
    lines: Sequence[dict[str, Any]],
    best: Round | None,
    *,
    seconds: float,
    parent: TrackedRun,
) -> dict[str, Any]:
    """Return the summary of all rounds; write it beside that of the last round, and show it everywhere.

    ``parent`` is the flow run's own run in MLflow.
    """
    summary = {
        "profile": profile,
        "seconds": round(seconds, 3),
        "finished": time.time(),
        "rounds": list(lines),
        "count": config.rounds.count,
        "best": best.number if best else None,
        "run": best.run_id if best else None,
        "report": str(home() / "report.html"),
    }
    path = home() / "runs" / _folder_of(lines[-1]) / FILE
    summary["file"] = str(path)
    replace_text(path, json.dumps(summary, indent=1) + "\n")
    table = as_markdown(summary)
    facts = quote_facts(pipeline_facts(profile, config.model_dump(mode="json")))
    parent.set_tags({"result": describe_rounds(summary), NOTE: f"{table}\n\n{facts}"})
    parent.upload(path)
    _log_curves(lines, parent)
    create_markdown_artifact(f"# {escape(describe_rounds(summary))}\n\n{table}\n", key="rounds")
    return summary


def _folder_of(line: Mapping[str, Any]) -> str:
    return str(line["file"]).rsplit("/", 2)[1]


def _log_curves(lines: Sequence[Mapping[str, Any]], parent: TrackedRun) -> None:
    """Log the figures of the rounds as curves of their run in MLflow, with the round as the step."""
    stamp = int(time.time() * 1000)
    points: list[Metric] = [
        (f"rounds/{title.replace(' ', '_')}", value, stamp, line["number"])
        for line in lines
        for title, name in COLUMNS.items()
        if (value := _number(line[name])) is not None
    ]
    if parent.is_on and points:
        with parent.tracker.turned_off_by_errors():
            parent.tracker.log_metrics(str(parent.run_id), points)


def _number(figure: Any) -> float | None:
    value = figure.get("value") if isinstance(figure, dict) else figure
    return float(value) if isinstance(value, int | float) else None


def describe_rounds(summary: Mapping[str, Any]) -> str:
    """Return what the rounds have come to, in one or two sentences."""
    last = summary["rounds"][-1]
    ran = f"{last['number']} of {summary['count']} rounds {'was' if last['number'] == 1 else 'were'} run"
    if last["number"] < summary["count"]:
        ran += (
            f", as round {last['number']} was {'lost' if last['outcome'] == 'lost' else 'not shown to win'}"
        )
    if summary["best"] is None:
        return f"No round was shown to win, so there is nothing to promote; {ran}."
    best = next(line for line in summary["rounds"] if line["number"] == summary["best"])
    if not best["number"]:
        return f"No round was shown to win against the policy that was trained on votes; {ran}."
    figure = best["sentence"].partition("  ")[0].removeprefix("won: ")
    return f"Round {best['number']} is the last that won ({figure}); {ran}."


def table_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of rounds as text: a row of titles, then one for each round."""
    titles = {title: name for title, name in COLUMNS.items() if _is_shown(summary, name)}
    rows = [["round", *titles, "outcome", "time"]]
    for line in summary["rounds"]:
        cells = [_cell(line[name], with_interval=name in RATES) for name in titles.values()]
        outcome = f"{line['outcome']}, best" if line["number"] == summary["best"] else line["outcome"]
        rows.append([str(line["number"]), *cells, outcome, format_duration(line["seconds"])])
    return rows


def _cell(figure: Any, *, with_interval: bool) -> str:
    """Return a figure as text, without the number of questions."""
    if isinstance(figure, dict):
        shown = ("value", "low", "high") if with_interval else ("value",)
        figure = {name: figure[name] for name in shown}
    return "" if figure is None else format_metric(figure)


def _is_shown(summary: Mapping[str, Any], name: str) -> bool:
    return any(line[name] is not None for line in summary["rounds"])


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table of rounds in Markdown."""
    titles, *rows = table_rows(summary)
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows)]
    return "\n".join(lines)
