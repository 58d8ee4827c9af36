"""Render the report of a run as one self-contained HTML page."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pyarrow.parquet as pq

from tasks.dataset.card import Card
from tasks.reporting import pages, reward_charts, stage_charts, stage_panels
from tasks.reporting.evaluation import over_optimisation
from tasks.reporting.evaluation.policies import NAMES
from tasks.reporting.histograms import draw_histograms
from tasks.reporting.numbers import format_interval, format_number, format_percent, format_share, format_tick
from tasks.reporting.reward_charts import Panel
from tasks.reporting.stage_charts import Chart
from tasks.reporting.text import build_link, clip_text, link_author

TEMPLATE = "run_report.html.j2"
PARTS = (  # that the template includes; what a module names is in the version of its code
    "verdict.html.j2",
    "leaderboard.html.j2",
    "judges.html.j2",
    "costs.html.j2",
    "comparisons.html.j2",
)
NUM_SAMPLES = 12
LONGEST_TEXT = 1500  # characters of an answer that are shown


class StageView(TypedDict):
    """What the page shows of a stage."""

    name: str
    title: str
    about: str
    facts: list[tuple[str, str]]
    charts: list[Chart]
    shares: list[Panel]
    steps: int


def render(**values: Any) -> bytes:
    """Return the page as UTF-8; everything but Markup is escaped."""
    environment = pages.build_environment()
    environment.filters |= {
        "number": format_number,
        "percent": format_percent,
        "share": format_share,
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
        cards=[judge for judge in values["judges"] if judge["card"]],
        data_charts=_draw_data_charts(values["card"]),
        voted=kind in ("shell-site", "stack-exchange", "stack-exchange-preferences"),
        **values,
    )
    return page.encode()


def build_stage(name: str, folder: Path, metrics: Mapping[str, Any]) -> StageView:
    """Return title, facts and drawings of a stage from its artifact."""
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    measures, scores = _read_json(folder / "measures.json"), _read_json(folder / "scores.json")
    title, about = stage_panels.TITLES[name]
    drawings = stage_charts.draw_charts(name, lines, metrics) + reward_charts.draw_calibration(measures)
    drawings[3:3] = over_optimisation.draw_over_optimisation(scores)  # a row of their own
    drawn = stage_charts.drawn_metrics(name, lines) | reward_charts.drawn_metrics(measures)
    return {
        "name": name,
        "title": title,
        "about": about,
        "facts": stage_charts.format_facts(metrics, drawn) + over_optimisation.describe_decisions(scores),
        "charts": drawings,
        "shares": reward_charts.build_panels(measures),
        "steps": len(lines) if drawings else 0,  # without drawings the lines are progress, not steps
    }


def _read_json(path: Path) -> dict[str, Any]:
    """Return a file's object; an empty one if the stage has written no such file."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


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


def read_samples(winrate: Path, data: Path, judges: Sequence[str]) -> list[dict[str, Any]]:
    """Return questions spread evenly over the evaluation split, with every policy's answer.

    The chosen answer comes with its source. ``judges`` are names; of those that score, the first says which
    answer is the best.
    """
    table, evaluation = pq.read_table(winrate / "samples.parquet"), pq.read_table(data / "evaluation.parquet")
    indices = {table.num_rows * k // NUM_SAMPLES for k in range(NUM_SAMPLES)} if table.num_rows else set()
    rows = table.take(sorted(indices)).to_pylist()
    row_of = {id: number for number, id in enumerate(evaluation["question_id"].to_pylist())}
    sources = evaluation.take([row_of[row["question_id"]] for row in rows]).to_pylist()
    return [_build_sample(row, source, judges) for row, source in zip(rows, sources, strict=True)]


def _build_sample(row: Mapping[str, Any], source: Mapping[str, Any], judges: Sequence[str]) -> dict[str, Any]:
    assert row["question"] == source["prompt"], "the samples are not of this data"
    scoring = [by for by in judges if f"chosen.{by}" in row]
    answers = []
    for name in NAMES:
        if f"{name}.answer" in row:
            scores = {by: row[f"{name}.{by}"] for by in scoring}
            answers.append({"name": name, "text": row[f"{name}.answer"], "scores": scores})
    best = max(answer["scores"][scoring[0]] for answer in answers)
    for answer in answers:
        answer["best"] = answer["scores"][scoring[0]] == best
    return {"question": row["question"], "answers": answers, "sources": _build_sources(source)}


def _build_sources(source: Mapping[str, Any]) -> list[dict[str, str]]:
    names = ("url", "author", "author_name", "licence")
    question = {name: source[f"question_{name}"] for name in names}
    answer = {name: source[f"answer_{name}"][source["best"]] for name in names}
    return [{"what": "question", **question}, {"what": "chosen answer", **answer}]
