"""Test the summary in Prefect's page of a run: links that a browser can open, and no text that becomes
markup.
"""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from flows.display import run_summary
from flows.display.run_end import describe_end
from flows.display.run_summary import as_markdown, conclude
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
    "headline": "PPO wins 64.1 % against SFT: better",
    "gates": "PPO passes all 6 gates.",
}
EVIL = "[x](https://evil.example) <img src=x onerror=alert(1)> **b** `c` # d | e \\ https://evil.example"


def html_of(markdown: str) -> str:
    return MarkdownIt("gfm-like", {"linkify": False}).render(markdown)


def test_a_result_starts_with_its_headline_and_where_the_report_is() -> None:
    shown = html_of(
        as_markdown(
            SUMMARY,
            "http://mlflow:5000/#/experiments/1/runs/2/artifacts/report.html?workflowType=machine_learning",
        )
    )
    assert shown.startswith(f"<h1>{SUMMARY['headline']}</h1>\n<p>{SUMMARY['gates']}</p>")
    assert (
        '<a href="http://mlflow:5000/#/experiments/1/runs/2/artifacts/report.html?'
        'workflowType=machine_learning">The report in MLflow</a>'
    ) in shown
    assert "<td>ppo.kl</td>" in shown


@pytest.mark.parametrize(
    "title", [EVIL, f"1. {EVIL}", f"- {EVIL}", f"> {EVIL}", "=====", "~~~", "<script>alert(1)</script>"]
)
def test_no_text_becomes_markup_on_prefects_page(title: str) -> None:
    shown = html_of(
        as_markdown(
            SUMMARY | {"report": f"/home/{EVIL}/report.html", "headline": title, "gates": f"PPO {title}"}, ""
        )
    )
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
    (page.parent / "headline.json").write_text('{"sentence": "PPO beats SFT"}')
    (page.parent / "model-cards" / "ppo").mkdir(parents=True)
    (page.parent / "model-cards" / "ppo" / "README.md").write_text("---\nlicense: other\n---\n# PPO\n")
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")

    def link(address: str, *_: Any, key: str, **__: Any) -> None:
        made[key] = address

    monkeypatch.setattr(run_summary, "create_link_artifact", link)
    monkeypatch.setattr(
        run_summary, "create_markdown_artifact", lambda text, key, description: made.setdefault(key, text)
    )
    tags: dict[str, str] = {}
    uploads: dict[str, str | None] = {}
    monkeypatch.setattr(Tracker, "upload", lambda self, run, path, to, *_: uploads.update({path.name: to}))
    monkeypatch.setattr(Tracker, "log_metrics", lambda *_, **__: None)
    monkeypatch.setattr(Tracker, "search", lambda *_, **__: [])
    monkeypatch.setattr(Tracker, "set_tags", lambda self, run_id, tag: tags.update(tag))
    monkeypatch.setattr(run_summary, "assess", lambda *_: None)
    monkeypatch.setattr(Tracker, "is_up", is_on)
    summary = conclude(
        Pipeline(),
        SUMMARY,
        page,
        run=run_summary.RunName("r", "demo"),
        tracked=TrackedRun(Tracker(tmp_path, "http://mlflow:5000"), "m" if is_on else None),
    )
    assert not [text for text in made.values() if "file:" in text]
    assert made["report"].startswith("# PPO beats SFT")
    assert ("/runs/m/artifacts/report.html" in made["report"], len(made)) == (is_on, 4 if is_on else 1)
    linked = {key: address.partition("artifacts/")[2] for key, address in made.items() if key != "report"}
    view = "?workflowType=machine_learning"
    files = {
        "report": "report.html",
        "model-card-of-ppo": "model-cards/ppo/README.md",
        "data-card": "card.html",
    }
    assert linked == ({f"mlflow-{name}": file + view for name, file in files.items()} if is_on else {})
    note = html_of(tags.get("mlflow.note.content", ""))
    assert note.startswith("<p><strong>PPO beats SFT.</strong></p>") == is_on
    assert all((f'{file}{view}">' in note) == is_on for file in files.values())
    kept = dict.fromkeys(("report.html", "card.html", "summary.json", "config.json"))
    assert uploads == (kept | {"model-cards": "model-cards"} if is_on else {})
    assert (tmp_path / "runs" / "r" / "model-cards" / "ppo" / "README.md").exists()
    assert (summary["report"] in html_of(made["report"])) == (not is_on)


def fill(page: str, summary: dict[str, Any]) -> str:
    return run_summary.fill_page(page, summary, {"profile": "<b>"}, "GATES")


def test_failures_stand_above_all_else_on_both_pages() -> None:
    failed = SUMMARY | {"failed": {"dpo": f"dpo: {EVIL}"}, "not_run": {"merge": ["sft", "dpo"]}}
    page = fill(f"<main>\n<h1>x</h1>{run_summary.MARKER}<p>&lt;main></p></main>", failed)
    assert page.startswith('<main>\n<p class="warning">dpo: [x](https://evil.example) &lt;img src=x')
    assert '<p class="warning">merge: not run: sft and dpo failed</p>\n<h1>' in page
    assert page.count("merge: not run") == 1
    assert "<td>ppo</td>" in page
    shown = html_of(as_markdown(failed | {"report": "/h/report.html"}, ""))
    assert "<li>merge: not run: sft and dpo failed</li>" in shown
    assert "<img" not in shown
    assert fill("<main>", SUMMARY) == "<main>"


def test_a_page_is_filled_with_what_is_in_no_key() -> None:
    page = fill("<dl><!--run-facts--></dl><div><!--gates-->old<!--end of gates--></div>", SUMMARY)
    assert page == (
        "<dl><div><dt>profile</dt><dd>&lt;b&gt;</dd></div></dl>"
        "<div><!--gates-->GATES<!--end of gates--></div>"
    )


@pytest.mark.parametrize(
    ("headline", "gates", "said"),
    [
        ("PPO wins", "The gate kl refuses PPO.", "PPO wins. The gate kl refuses PPO."),
        ("", "", "No policies were compared."),
    ],
)
def test_the_end_says_what_was_shown_and_what_the_gates_say(headline: str, gates: str, said: str) -> None:
    assert describe_end({"headline": headline, "gates": gates}) == said


def test_a_server_without_a_registry_leaves_the_gates_open_and_the_run_tracked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("there is no registry\nat all")

    monkeypatch.setattr(run_summary, "assess", fail)
    monkeypatch.setattr(Tracker, "is_up", True)
    tracked = TrackedRun(Tracker(tmp_path, "http://localhost:1"), "run")
    found = run_summary._assess(Pipeline(), SUMMARY, tracked)
    assert found.sentence == (
        "The registry in MLflow cannot be read, so the gates were not asked (there is no registry)."
    )
    assert "<b>Not decided.</b>" in found.content
    assert not tracked.tracker._is_off
