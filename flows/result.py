"""The end of a run: its summary, and the page with this run's stages filled in."""

import html
import json
import time
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.figures import figure, told
from tasks import tracker
from tasks.artifact import Artifact
from tasks.digests import replace_text
from tasks.programs.config import Pipeline
from tasks.store import home
from tasks.tracking import Tracked

MARKER = "<!--stage-table-->"  # where the report stage leaves room: its page must not change with a run's times


def summarise(profile: str, made: list[Artifact], seconds: float) -> dict[str, Any]:
    """The run as JSON: every stage, and the figures of all of them in one flat table."""
    stages = [{name: artifact[name] for name in ("key", "digest", "seconds", "peak_mb", "cached", "metrics", "warnings")} for artifact in made]
    named = [{"name": artifact["stage"], **stage} for artifact, stage in zip(made, stages, strict=True)]
    metrics = {name: value for artifact in made for name, value in artifact["metrics"].items()}
    return {"profile": profile, "seconds": round(seconds, 3), "stages": named, "metrics": metrics}


def conclude(config: Pipeline, summary: dict[str, Any], page: Path, *, run_id: str, tracked: Tracked) -> dict[str, Any]:
    """Keep summary, settings and page under runs/<id>/, give the page to Prefect and MLflow, and say in the summary where it is."""
    folder = home() / "runs" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    filled = page.read_text(encoding="utf-8").replace(MARKER, stage_table(summary["stages"]))
    for place in (folder, home()):
        replace_text(place / "report.html", filled)
        replace_text(place / "card.html", (page.parent / "card.html").read_text(encoding="utf-8"))
    summary = {**summary, "report": str(home() / "report.html"), "file": str(folder / "summary.json"), "finished": time.time()}
    replace_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    replace_text(folder / "config.json", config.model_dump_json(indent=1) + "\n")
    tracked.summary({**summary["metrics"], "seconds": summary["seconds"]})
    for name in ("report.html", "card.html", "summary.json", "config.json"):
        tracked.files(folder / name)
    create_link_artifact((folder / "report.html").as_uri(), "Report", key="report", description="Opens on the machine that ran the pipeline.")
    if tracked.is_on and (page_there := tracker.page(str(tracked.run_id))):
        create_link_artifact(page_there, "Report, figures and files in MLflow", key="mlflow")
    create_markdown_artifact(as_markdown(summary), key="result")
    return summary


def stage_table(stages: list[dict[str, Any]]) -> str:
    """This run's stages as an HTML table; everything escaped."""
    head = "<tr><th>stage</th><th>key</th><th>result</th><th>seconds</th><th>peak MB</th></tr>"
    rows = []
    for stage in stages:
        cells = (stage["name"], stage["key"][:12], told(stage), f"{stage['seconds']:.1f}", f"{stage['peak_mb']:.0f}")
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f'<table class="stages"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def as_markdown(summary: dict[str, Any]) -> str:
    """Figures and stages for Prefect's page of the run."""
    figures = [f"| {_cell(name)} | {figure(value)} |" for name, value in summary["metrics"].items()]
    stages = [f"| {stage['name']} | {stage['key'][:12]} | {told(stage)} | {stage['seconds']:.1f} |" for stage in summary["stages"]]
    lines = ["| figure | value |", "|---|---|", *figures, "", "| stage | key | result | seconds |", "|---|---|---|---|", *stages]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
