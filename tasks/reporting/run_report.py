"""Render the report of a run as one self-contained HTML page."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pyarrow.parquet as pq
from markupsafe import Markup

from tasks.dataset.card import Card
from tasks.reporting import charts, pages, reward_charts, stage_charts
from tasks.reporting.histograms import draw_histograms
from tasks.reporting.numbers import format_interval, format_number, format_percent, format_tick
from tasks.reporting.reward_charts import Bar, Panel
from tasks.reporting.stage_charts import Chart
from tasks.reporting.text import build_link, clip_text, link_author

TEMPLATE = "run_report.html.j2"
NAMES = {"chosen": "chosen answers", "base": "base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
# opponents: the model that all started from first, the chosen answers last
ORDER = {"sft": 0, "dpo": 1, "ppo": 2, "chosen": 3}
JUDGES = {
    "gold": ("gold scorer", "The gold scorer knows what is right, and no training stage ever saw it."),
    "reward": (
        "reward model",
        "PPO was trained to please this very judge, so its wins here are an upper bound and no proof.",
    ),
}
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
NUM_SAMPLES = 12
LONGEST_TEXT = 1500  # characters of an answer that are shown


Rate = Mapping[str, Any]  # value, low, high and n of a share


class StageView(TypedDict):
    """What the page shows of a stage."""

    name: str
    title: str
    about: str
    facts: list[tuple[str, str]]
    charts: list[Chart]
    shares: list[Panel]
    steps: int


class Comparison(TypedDict):
    """The comparisons of two policies by one judge."""

    ours: str
    theirs: str
    rate: Rate
    tally: Mapping[str, int] | None  # wins, ties and losses; None in artifacts of old versions
    verdict: str
    bar: Markup


class Judge(TypedDict):
    """A judge with its comparisons."""

    name: str
    about: str
    by: str
    rows: list[Comparison]


class Headline(TypedDict):
    """The comparison that the page's title is about."""

    judge: Judge
    best: Comparison
    rows: list[Comparison]


def render(**values: Any) -> bytes:
    """Return the page as UTF-8; everything but Markup is escaped."""
    environment = pages.build_environment()
    environment.filters |= {
        "number": format_number,
        "percent": format_percent,
        "span": format_interval,
        "points": format_tick,
        "clip": partial(clip_text, most=LONGEST_TEXT),
        "link": build_link,
        "author": link_author,
    }
    kind = values["card"]["kind"]
    page = environment.get_template(TEMPLATE).render(
        style=pages.read_style(),
        names=NAMES,
        data_charts=_draw_data_charts(values["card"]),
        voted=kind in ("shell-site", "stack-exchange", "stack-exchange-preferences"),
        **values,
    )
    return page.encode()


def build_stage(name: str, folder: Path, metrics: Mapping[str, Any]) -> StageView:
    """Return title, facts and drawings of a stage from its artifact."""
    log, measures_file = folder / "metrics.jsonl", folder / "measures.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    measures = json.loads(measures_file.read_text()) if measures_file.is_file() else {}
    title, about = stage_charts.TITLES[name]
    drawings = stage_charts.draw_charts(name, lines, metrics) + reward_charts.draw_calibration(measures)
    drawn = stage_charts.drawn_metrics(name, lines) | reward_charts.drawn_metrics(measures)
    return {
        "name": name,
        "title": title,
        "about": about,
        "facts": stage_charts.format_facts(metrics, drawn),
        "charts": drawings,
        "shares": reward_charts.build_panels(measures),
        "steps": len(lines) if drawings else 0,  # without drawings the lines are progress, not steps
    }


def group_stages(stages: list[StageView]) -> list[list[StageView]]:
    """Return the stages by cell of the page: consecutive stages without charts share a cell."""
    cells: list[list[StageView]] = []
    for stage in stages:
        if cells and not stage["charts"] and not cells[-1][-1]["charts"]:
            cells[-1].append(stage)
        else:
            cells.append([stage])
    return cells


def _draw_data_charts(card: Card) -> list[Chart]:
    shown = ("Answer scores", "Answer length", "Question length")  # the data card shows all
    return [
        Chart(one.title, one.note, [], one.drawing) for one in draw_histograms(card) if one.title in shown
    ]


def build_evaluation(
    metrics: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any], judged_on: Mapping[str, str]
) -> dict[str, Any]:
    """Return comparisons by judge, the headline, accuracies and a row per policy."""
    won = metrics.get("winrate", {})
    all_metrics = {name: value for stage in metrics.values() for name, value in stage.items()}
    judges: list[Judge] = []
    for by, (name, about) in JUDGES.items():
        if rows := _build_comparisons(by, won, results["tallies"]):
            judges.append({"name": name, "about": about, "by": by, "rows": rows})
    accuracies = []
    for name, (title, about) in ACCURACIES.items():
        if name in all_metrics:
            note = f"{about} {judged_on.get(name, '')}".strip()
            accuracies.append(_build_accuracy_bar(title, note, all_metrics[name]))
    policies = [_build_policy(name, won) for name in ("chosen", *results["policies"])] if won else []
    return {
        "judges": judges,
        "accuracies": accuracies,
        "policies": policies,
        "headline": _choose_headline(judges),
    }


def _build_comparisons(by: str, metrics: Mapping[str, Any], tallies: Mapping[str, Any]) -> list[Comparison]:
    rows: list[Comparison] = []
    for name, rate in metrics.items():
        if match := re.fullmatch(rf"{by}_win_rate\.(\w+)_vs_(\w+)", name):
            ours, theirs = match.groups()
            tally = tallies.get(f"{by}.{ours}_vs_{theirs}")
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
    return sorted(rows, key=lambda row: (ORDER.get(row["theirs"], 9), -ORDER.get(row["ours"], 9)))


def describe_result(rate: Rate) -> str:
    """Return 'beats', 'loses to', or 'is level with' if the interval contains one half."""
    if rate["low"] > 0.5:
        return "beats"
    return "loses to" if rate["high"] < 0.5 else "is level with"


def _draw_comparison_bar(ours: str, theirs: str, rate: Rate, tally: Mapping[str, int] | None) -> Markup:
    counts = tally or {
        "wins": rate["value"] * rate["n"],
        "ties": 0,
        "losses": (1 - rate["value"]) * rate["n"],
    }
    total = sum(counts.values()) or 1
    parts = [
        (f"p-{ours}", counts["wins"] / total),
        ("tie", counts["ties"] / total),
        (f"p-{theirs}", counts["losses"] / total),
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


def _build_policy(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    metric_names = {
        "gold": f"gold_score.{name}",
        "reward": f"reward_score.{name}",
        "kl": f"{name}.kl",
        "length": f"{name}.length",
        "ended": f"{name}.ended",
    }
    return {"name": name} | {label: metrics.get(key) for label, key in metric_names.items()}


def _choose_headline(judges: list[Judge]) -> Headline | None:
    """Return the best trained policy against SFT, by the most trustworthy judge.

    Without a trained policy, SFT against the chosen answers.
    """
    if not judges:
        return None
    rows = judges[0]["rows"]
    trained = [row for row in rows if row["theirs"] == "sft"] or rows
    return {"judge": judges[0], "best": max(trained, key=lambda row: row["rate"]["value"]), "rows": rows}


def read_samples(winrate: Path, data: Path) -> list[dict[str, Any]]:
    """Return questions spread evenly over the evaluation split, with every policy's answer.

    The chosen answer comes with its source.
    """
    table, evaluation = pq.read_table(winrate / "samples.parquet"), pq.read_table(data / "evaluation.parquet")
    indices = {table.num_rows * k // NUM_SAMPLES for k in range(NUM_SAMPLES)} if table.num_rows else set()
    rows = table.take(sorted(indices)).to_pylist()
    row_of = {id: number for number, id in enumerate(evaluation["question_id"].to_pylist())}
    sources = evaluation.take([row_of[row["question_id"]] for row in rows]).to_pylist()
    return [_build_sample(row, source) for row, source in zip(rows, sources, strict=True)]


def _build_sample(row: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    assert row["question"] == source["prompt"], "the samples are not of this data"
    judges = [by for by in JUDGES if f"chosen.{by}" in row]
    answers = []
    for name in NAMES:
        if f"{name}.answer" in row:
            scores = {by: row[f"{name}.{by}"] for by in judges}
            answers.append({"name": name, "text": row[f"{name}.answer"], "scores": scores})
    best = max(answer["scores"][judges[0]] for answer in answers)
    for answer in answers:
        answer["best"] = answer["scores"][judges[0]] == best
    return {"question": row["question"], "answers": answers, "sources": _build_sources(source)}


def _build_sources(source: Mapping[str, Any]) -> list[dict[str, str]]:
    names = ("url", "author", "author_name", "licence")
    question = {name: source[f"question_{name}"] for name in names}
    answer = {name: source[f"answer_{name}"][source["best"]] for name in names}
    return [{"what": "question", **question}, {"what": "chosen answer", **answer}]
