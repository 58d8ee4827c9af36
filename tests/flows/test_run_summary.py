"""Test the summary in Prefect's page of a run: links that a browser can open, and no text that becomes
markup.
"""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows.display import run_summary
from flows.display.run_summary import as_markdown, conclude, headline
from tasks.config.pipeline import Pipeline
from tasks.tracking.client import Tracker
from tasks.tracking.tracked_run import TrackedRun

STAGE = {
    "name": "ppo",
    "key": "0" * 64,
    "cached": False,
    "seconds": 1.0,
    "peak_mb": 1.0,
    "metrics": {},
    "warnings": [],
}
SUMMARY: dict[str, Any] = {
    "profile": "demo",
    "seconds": 1.0,
    "stages": [STAGE],
    "metrics": {"ppo.kl": 0.5},
    "failed": {},
    "not_run": {},
}
EVIL = "[x](https://evil.example) <img src=x onerror=alert(1)> **b** `c` # d | e \\ https://evil.example"


def html_of(markdown: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(markdown)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (
            "<body><h1>PPO beats SFT,\n winning 64.1&nbsp;% of the comparisons</h1><h1>no</h1>",
            "PPO beats SFT, winning 64.1 % of the comparisons",
        ),
        ("<h1>a.&lt;b&gt;<wbr>org</h1>", "a.<b>org"),
        ("<body></body>", ""),
    ],
)
def test_the_headline_is_the_reports_own(page: str, text: str) -> None:
    assert headline(page) == text


def test_a_result_starts_with_its_headline_and_where_the_report_is() -> None:
    shown = html_of(
        as_markdown(
            SUMMARY,
            "PPO beats SFT",
            "http://mlflow:5000/#/experiments/1/runs/2/artifacts/report.html?workflowType=machine_learning",
        )
    )
    assert shown.startswith("<h1>PPO beats SFT</h1>")
    assert (
        '<a href="http://mlflow:5000/#/experiments/1/runs/2/artifacts/report.html?'
        'workflowType=machine_learning">The report in MLflow</a>'
    ) in shown
    assert "<td>ppo.kl</td>" in shown


@pytest.mark.parametrize(
    "title", [EVIL, f"1. {EVIL}", f"- {EVIL}", f"> {EVIL}", "=====", "~~~", "<script>alert(1)</script>"]
)
def test_no_text_becomes_markup_on_prefects_page(title: str) -> None:
    shown = html_of(as_markdown(SUMMARY | {"report": f"/home/{EVIL}/report.html"}, title, ""))
    assert not [
        tag
        for tag in ("<a ", "<img", "<script", "<strong", "<code", "<ul", "<ol", "<blockquote", "<pre", "<hr")
        if tag in shown
    ]


@pytest.mark.parametrize("is_on", [True, False])
def test_no_artifact_links_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_on: bool) -> None:
    """A browser refuses to go from a server's page to a file, even on the same machine."""
    made: dict[str, str] = {}
    page = tmp_path / "page" / "report.html"
    page.parent.mkdir()
    page.write_text(f"<h1>PPO beats SFT</h1>{run_summary.MARKER}")
    (page.parent / "card.html").write_text("card")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")

    def link(address: str, *_: Any, key: str) -> None:
        made[key] = address

    monkeypatch.setattr(run_summary, "create_link_artifact", link)
    monkeypatch.setattr(run_summary, "create_markdown_artifact", lambda text, key: made.setdefault(key, text))
    for name in ("log_metrics", "set_tags", "upload"):
        monkeypatch.setattr(Tracker, name, lambda *_, **__: None)
    monkeypatch.setattr(Tracker, "is_up", is_on)
    summary = conclude(
        Pipeline(),
        SUMMARY,
        page,
        run_id="r",
        tracked=TrackedRun(Tracker(tmp_path, "http://mlflow:5000"), "m" if is_on else None),
    )
    assert not [text for text in made.values() if "file:" in text]
    assert made["report"].startswith("# PPO beats SFT")
    assert ("/runs/m/artifacts/report.html" in made["report"], "mlflow" in made) == (is_on, is_on)
    assert (summary["report"] in html_of(made["report"])) == (not is_on)


def test_failures_stand_above_all_else_on_both_pages() -> None:
    failed = SUMMARY | {"failed": {"dpo": f"dpo: {EVIL}"}, "not_run": {"merge": ["sft", "dpo"]}}
    page = run_summary.fill_page(f"<main>\n<h1>x</h1>{run_summary.MARKER}<p>&lt;main></p></main>", failed)
    assert page.startswith('<main>\n<p class="warning">dpo: [x](https://evil.example) &lt;img src=x')
    assert '<p class="warning">merge: not run: sft and dpo failed</p>\n<h1>' in page
    assert page.count("merge: not run") == 1
    assert "<td>ppo</td>" in page
    shown = html_of(as_markdown(failed | {"report": "/h/report.html"}, "PPO beats SFT", ""))
    assert "<li>merge: not run: sft and dpo failed</li>" in shown
    assert "<img" not in shown
    assert run_summary.fill_page("<main>", SUMMARY) == "<main>"
