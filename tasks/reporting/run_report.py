"""Render the report of a run as one self-contained HTML page."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tasks.reporting import charts, reward_charts, stage_charts
from tasks.reporting.histograms import histograms
from tasks.reporting.text import author, clip, link, visible

TEMPLATE, STYLE = "run_report.html.j2", "report.css"
NAMES = {"chosen": "chosen answers", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
ORDER = {
    "sft": 0,
    "dpo": 1,
    "ppo": 2,
    "chosen": 3,
}  # opponents: the model everything started from first, the people last
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


def render(**values: Any) -> bytes:
    """The page as UTF-8; whatever is no Markup is escaped."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=visible,
    )
    environment.filters |= {
        "number": stage_charts.number,
        "percent": stage_charts.percent,
        "span": stage_charts.span,
        "points": charts.short,
    }
    environment.filters |= {"clip": partial(clip, most=LONGEST_TEXT), "link": link, "author": author}
    style = Markup((here / STYLE).read_text(encoding="utf-8"))  # noqa: S704 - our own file
    data = _data_charts(values["card"])
    voted = values["card"]["kind"] in ("shell-site", "stack-exchange", "stack-exchange-preferences")
    return (
        environment.get_template(TEMPLATE)
        .render(style=style, names=NAMES, data_charts=data, voted=voted, **values)
        .encode()
    )


def stage_section(name: str, folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    measures = json.loads(file.read_text()) if (file := folder / "measures.json").is_file() else {}
    title, about = stage_charts.TITLES[name]
    drawings = stage_charts.draw(name, lines, metrics) + reward_charts.calibration(measures)
    facts = stage_charts.facts(metrics, stage_charts.drawn_of(name, lines) | reward_charts.drawn_of(measures))
    shares = reward_charts.panels_of(measures)
    steps = len(lines) if drawings else 0  # progress of something else is counted in other things
    return {
        "name": name,
        "title": title,
        "about": about,
        "facts": facts,
        "charts": drawings,
        "shares": shares,
        "steps": steps,
    }


def table_cells(stages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Stages by their places on the page: neighbours of which nothing is drawn share one."""
    cells: list[list[dict[str, Any]]] = []
    for stage in stages:
        if cells and not stage["charts"] and not cells[-1][-1]["charts"]:
            cells[-1].append(stage)
        else:
            cells.append([stage])
    return cells


def _data_charts(card: Mapping[str, Any]) -> list[stage_charts.Chart]:
    shown = ("Answer scores", "Answer length", "Question length")  # the data card has them all
    return [
        stage_charts.Chart(one.title, one.note, [], one.drawing)
        for one in histograms(card)
        if one.title in shown
    ]


def evaluation(
    metrics: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any], judged_on: Mapping[str, str]
) -> dict[str, Any]:
    """Comparisons by judge, the headline, accuracies and a row per policy."""
    won = metrics.get("winrate", {})
    everything = {name: value for stage in metrics.values() for name, value in stage.items()}
    judges = [
        {"name": JUDGES[by][0], "about": JUDGES[by][1], "by": by, "rows": rows}
        for by in JUDGES
        if (rows := _comparisons(by, won, results["tallies"]))
    ]
    told = {
        name: (title, f"{about} {judged_on.get(name, '')}".strip())
        for name, (title, about) in ACCURACIES.items()
    }
    accuracies = [_accuracy(*texts, everything[name]) for name, texts in told.items() if name in everything]
    policies = [_policy(name, won) for name in ("chosen", *results["policies"])] if won else []
    return {"judges": judges, "accuracies": accuracies, "policies": policies, "headline": _headline(judges)}


def _comparisons(by: str, metrics: Mapping[str, Any], tallies: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, rate in metrics.items():
        if match := re.fullmatch(rf"{by}_win_rate\.(\w+)_vs_(\w+)", name):
            ours, theirs = match.groups()
            rows.append(
                {
                    "ours": ours,
                    "theirs": theirs,
                    "rate": rate,
                    "tally": tallies.get(f"{by}.{ours}_vs_{theirs}"),
                    "verdict": verdict(rate),
                }
            )
    for row in rows:
        row["bar"] = _tally_bar(**row)
    return sorted(rows, key=lambda row: (ORDER.get(row["theirs"], 9), -ORDER.get(row["ours"], 9)))


def verdict(rate: Mapping[str, Any]) -> str:
    """Whether the interval leaves room for doubt: 'beats', 'loses to' or 'is level with'."""
    return "beats" if rate["low"] > 0.5 else "loses to" if rate["high"] < 0.5 else "is level with"


def _tally_bar(
    *, ours: str, theirs: str, rate: Mapping[str, Any], tally: Mapping[str, int] | None, **_: Any
) -> Markup:
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
    title = f"{NAMES.get(ours, ours)} against {NAMES.get(theirs, theirs)}: {stage_charts.percent(rate['value'])} ({stage_charts.span(rate)})"
    return charts.share_bar(parts, value=rate["value"], low=rate["low"], high=rate["high"], title=title)


def _accuracy(title: str, about: str, rate: Mapping[str, Any]) -> reward_charts.Bar:
    bar = charts.share_bar(
        [("s0", rate["value"])],
        value=rate["value"],
        low=rate["low"],
        high=rate["high"],
        title=f"{title}: {stage_charts.span(rate)}",
    )
    return reward_charts.Bar(title, about, rate, bar)


def _policy(name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {
        "gold": f"gold_score.{name}",
        "reward": f"reward_score.{name}",
        "kl": f"{name}.kl",
        "length": f"{name}.length",
        "ended": f"{name}.ended",
    }
    return {"name": name} | {label: metrics.get(key) for label, key in wanted.items()}


def _headline(judges: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best of the trained policies against SFT (or, without any, SFT against the chosen answers), by the judge to be trusted most."""
    if not judges:
        return None
    rows = judges[0]["rows"]
    trained = [row for row in rows if row["theirs"] == "sft"] or rows
    return {"judge": judges[0], "best": max(trained, key=lambda row: row["rate"]["value"]), "rows": rows}


def sample_answers(winrate: Path, data: Path) -> list[dict[str, Any]]:
    """Questions spread evenly over the evaluation split, whoever won them, with every policy's answer and where the chosen one is from."""
    table = pq.read_table(winrate / "samples.parquet")
    places = sorted({table.num_rows * k // NUM_SAMPLES for k in range(NUM_SAMPLES)} if table.num_rows else ())
    shown, asked = table.take(places).to_pylist(), pq.read_table(data / "evaluation.parquet")
    row_of = {id: number for number, id in enumerate(asked["question_id"].to_pylist())}
    sources = asked.take([row_of[row["question_id"]] for row in shown]).to_pylist()
    return [_sample(row, source) for row, source in zip(shown, sources, strict=True)]


def _sample(row: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    assert row["question"] == source["prompt"], "the samples are not of this data"
    judges = [by for by in JUDGES if f"chosen.{by}" in row]
    answers = [
        {"name": name, "text": row[f"{name}.answer"], "scores": {by: row[f"{name}.{by}"] for by in judges}}
        for name in NAMES
        if f"{name}.answer" in row
    ]
    best = max(answer["scores"][judges[0]] for answer in answers)
    for answer in answers:
        answer["best"] = answer["scores"][judges[0]] == best
    return {"question": row["question"], "answers": answers, "sources": _sources(source)}


def _sources(source: Mapping[str, Any]) -> list[dict[str, str]]:
    names = ("url", "author", "author_name", "licence")
    asked = {name: source[f"question_{name}"] for name in names}
    answered = {name: source[f"answer_{name}"][source["best"]] for name in names}
    return [{"what": "question", **asked}, {"what": "chosen answer", **answered}]
