"""The end of a run: its summary, and the page with this run's stages filled in."""

import html
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.display.formatting import format_metric, format_not_run, format_outcome
from flows.display.mlflow_page import show_result
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.store import home
from tasks.config.pipeline import Pipeline
from tasks.system.files import replace_text
from tasks.tracking.tracked_run import TrackedRun

MARKER = (
    "<!--stage-table-->"  # where the report stage leaves room: its page must not change with a run's times
)


TOP = "<main>"  # of the report's page: what a run's failures are told below


def summarise(
    profile: str,
    made: list[Artifact],
    seconds: float,
    *,
    failed: dict[str, str],
    not_run: dict[str, list[str]],
) -> dict[str, Any]:
    """Return the run as JSON: the stages that were built, their figures in one flat table, and what failed.

    ``failed`` is a sentence by stage; ``not_run`` has the failed stages because of which a stage was not run.
    """
    stages = [
        {
            name: artifact[name]
            for name in ("key", "digest", "seconds", "peak_mb", "cached", "metrics", "warnings")
        }
        for artifact in made
    ]
    named = [{"name": artifact["stage"], **stage} for artifact, stage in zip(made, stages, strict=True)]
    metrics = {name: value for artifact in made for name, value in artifact["metrics"].items()}
    return {
        "profile": profile,
        "seconds": round(seconds, 3),
        "stages": named,
        "metrics": metrics,
        "failed": failed,
        "not_run": not_run,
    }


def conclude(
    config: Pipeline, summary: dict[str, Any], page: Path, *, run_id: str, tracked: TrackedRun
) -> dict[str, Any]:
    """Write summary, settings and page to runs/<id>/ and upload them.

    Returns the summary with the paths of the files.
    """
    folder = home() / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    filled = fill_page(page.read_text(encoding="utf-8"), summary)
    for place in (folder, home()):
        replace_text(place / "report.html", filled)
        replace_text(place / "card.html", (page.parent / "card.html").read_text(encoding="utf-8"))
    summary = {
        **summary,
        "report": str(home() / "report.html"),
        "file": str(folder / "summary.json"),
        "finished": time.time(),
    }
    replace_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    replace_text(folder / "config.json", config.model_dump_json(indent=1) + "\n")
    show_result(summary, config, tracked)
    for name in ("report.html", "card.html", "summary.json", "config.json"):
        tracked.upload(folder / name)
    page_there = tracked.tracker.page(str(tracked.run_id), "report.html") if tracked.is_on else ""
    if page_there:
        create_link_artifact(page_there, "Report, figures and files in MLflow", key="mlflow")
    create_markdown_artifact(as_markdown(summary, headline(filled), page_there), key="report")
    return summary


def fill_page(page: str, summary: dict[str, Any]) -> str:
    """Return the report's page with this run's stages in it and, at the top, what failed."""
    failures = "".join(f'\n<p class="warning">{html.escape(text)}</p>' for text in _failures(summary))
    return page.replace(TOP, TOP + failures, 1).replace(MARKER, stage_table(summary["stages"]))


def _failures(summary: dict[str, Any]) -> list[str]:
    """Return a sentence for each stage that failed or was not run."""
    not_run = [f"{name}: {format_not_run(causes)}" for name, causes in summary["not_run"].items()]
    return [*summary["failed"].values(), *not_run]


def stage_table(stages: list[dict[str, Any]]) -> str:
    """This run's stages as an HTML table; everything escaped."""
    head = "<tr><th>stage</th><th>key</th><th>result</th><th>seconds</th><th>peak MB</th></tr>"
    rows = []
    for stage in stages:
        cells = (
            stage["name"],
            stage["key"][:12],
            format_outcome(stage),
            f"{stage['seconds']:.1f}",
            f"{stage['peak_mb']:.0f}",
        )
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f'<table class="stages"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def headline(page: str) -> str:
    """Return the heading of the report's page as text, "" if it has none."""
    found = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", found[1])).split()) if found else ""


def as_markdown(summary: dict[str, Any], title: str, address: str) -> str:
    """Return the run's result for Prefect's page of it: headline, where the report is, figures and stages.

    A browser opens no file: address from a page of a server, so a report that is on no server is named by its
    path.
    """
    if address:
        where = (
            f"[The report in MLflow]({address}); saved from there and opened by itself, all its links work."
        )
    else:
        host = _escape(socket.gethostname())
        where = f"The report is {_escape(summary['report'])} on {host}, the machine that ran the pipeline."
    figures = [f"| {_cell(name)} | {format_metric(value)} |" for name, value in summary["metrics"].items()]
    stages = [
        f"| {stage['name']} | {stage['key'][:12]} | {format_outcome(stage)} | {stage['seconds']:.1f} |"
        for stage in summary["stages"]
    ]
    failures = [f"- {_escape(text)}" for text in _failures(summary)]
    tables = [
        *failures,
        *([""] if failures else []),
        "| figure | value |",
        "|---|---|",
        *figures,
        "",
        "| stage | key | result | seconds |",
        "|---|---|---|---|",
        *stages,
    ]
    return "\n".join([f"# {_escape(title or summary['profile'])}", "", where, "", *tables]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escape(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~-])", r"\\\1", text)
