"""The end of a run: its summary, and the page with this run's stages filled in."""

import html
import json
import re
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from prefect.artifacts import create_link_artifact, create_markdown_artifact

from flows.display.formatting import format_metric, format_not_run, format_outcome
from flows.display.mlflow_page import show_result
from flows.display.model_cards import CARD, FACTS, FOLDER, write_cards
from flows.display.run_end import describe_end
from flows.display.run_facts import collect_facts, facts_as_html
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.store import home
from tasks.config.pipeline import Pipeline
from tasks.promotion.assessment import assess
from tasks.promotion.gates import failures
from tasks.promotion.report_page import gates_as_html, replace_gates
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


class RunName(NamedTuple):
    """The flow run that is summarised."""

    id: str
    name: str = ""


def conclude(
    config: Pipeline, summary: dict[str, Any], page: Path, *, run: RunName, tracked: TrackedRun
) -> dict[str, Any]:
    """Write summary, settings, report and model cards to runs/<id>/, upload and link them.

    Returns the summary with the headline and the paths of the files.
    """
    folder = home() / "runs" / run.id
    folder.mkdir(parents=True, exist_ok=True)
    facts = collect_facts(config, profile=summary["profile"], run_name=run.name, run_id=run.id)
    gates = _assess(config, summary, tracked)
    filled = fill_page(page.read_text(encoding="utf-8"), summary, facts, gates.content)
    for place in (folder, home()):
        replace_text(place / "report.html", filled)
        replace_text(place / "card.html", (page.parent / "card.html").read_text(encoding="utf-8"))
    policies = write_cards(page.parent, folder, config, facts)
    headline = json.loads((page.parent / "headline.json").read_text(encoding="utf-8"))["sentence"]
    summary = {
        **summary,
        "headline": headline,
        "gates": gates.sentence,
        "report": str(home() / "report.html"),
        "file": str(folder / "summary.json"),
        "finished": time.time(),
    }
    replace_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    replace_text(folder / "config.json", config.model_dump_json(indent=1) + "\n")
    files = _list_files(policies)
    show_result(summary, config, tracked, files)
    for name in ("report.html", "card.html", "summary.json", "config.json"):
        tracked.upload(folder / name)
    tracked.upload(folder / FOLDER, FOLDER)
    _link(summary, files, tracked)
    return summary


class Gates(NamedTuple):
    """What the gates say about a run's policy."""

    sentence: str  # "" if no policy was trained
    content: str  # of the report's place for it


def _assess(config: Pipeline, summary: dict[str, Any], tracked: TrackedRun) -> Gates:
    """Ask the gates; what they say is as of now, and `alignflow promote` decides."""
    stages = {stage["name"]: stage for stage in summary["stages"]}
    if not tracked.is_on:
        return _undecided("MLflow, which knows the champion, is not reachable, so the gates were not asked.")
    try:
        found = assess(tracked.tracker, config.promotion, summary["profile"], summary["metrics"], stages)
    except Exception as error:  # as of a server without a registry: the run is tracked all the same
        reason = (str(error) or type(error).__name__).splitlines()[0][:300]
        return _undecided(f"The registry in MLflow cannot be read, so the gates were not asked ({reason}).")
    if found is None:
        return Gates("", gates_as_html("Nothing to promote.", "No policy was trained.", []))
    title = "Not to be promoted." if failures(found.results) else "May be promoted."
    if found.is_champion:
        title = "Promoted."
    return Gates(found.sentence, gates_as_html(title, found.sentence, found.results, found.off))


def _undecided(text: str) -> Gates:
    return Gates(text, gates_as_html("Not decided.", text, []))


def _list_files(policies: list[str]) -> dict[str, str]:
    """Return the files of a run that are linked from its pages, by their titles."""
    cards = {f"Model card of {policy.upper()}": f"{FOLDER}/{policy}/{CARD}" for policy in policies}
    return {"Report": "report.html", **cards, "Data card": "card.html"}


def _link(summary: dict[str, Any], files: dict[str, str], tracked: TrackedRun) -> None:
    """Link files of the run in MLflow from its page in Prefect."""
    pages = {
        title: tracked.tracker.page(str(tracked.run_id), file) if tracked.is_on else ""
        for title, file in files.items()
    }
    pages = {title: address for title, address in pages.items() if address}
    for title, address in pages.items():
        key = f"mlflow-{title.lower().replace(' ', '-')}"
        create_link_artifact(address, f"{title} in MLflow", key=key, description=f"{title} of this run")
    text = as_markdown(summary, pages.get("Report", ""))
    create_markdown_artifact(text, key="report", description=describe_end(summary))


def fill_page(page: str, summary: dict[str, Any], facts: dict[str, str], gates: str) -> str:
    """Return the report's page with this run's facts, gates and stages and, at the top, what failed."""
    failed = "".join(f'\n<p class="warning">{html.escape(text)}</p>' for text in _failures(summary))
    page = page.replace(TOP, TOP + failed, 1).replace(FACTS, facts_as_html(facts), 1)
    return replace_gates(page, gates).replace(MARKER, stage_table(summary["stages"]))


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


def as_markdown(summary: dict[str, Any], address: str) -> str:
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
    title = f"# {_escape(summary['headline'] or summary['profile'])}"
    gates = [_escape(summary["gates"]), ""] if summary["gates"] else []
    return "\n".join([title, "", *gates, where, "", *tables]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escape(text: str) -> str:
    """Return a text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~-])", r"\\\1", text)
