"""Write the gates' results into the report of a run, and again when a promotion has been decided.

The report is an artifact with a key, and the gates are in no key: a changed threshold must not rebuild it,
nor leave an old verdict in it. So the report leaves room, which is filled in outside its artifact.
"""

import html
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tasks.artifacts.store import home
from tasks.promotion.gate_results import GateResult
from tasks.promotion.gates import failures
from tasks.system.files import replace_text
from tasks.tracking.client import Tracker

REPORT = "report.html"
BEGIN, END = "<!--gates-->", "<!--end of gates-->"
VERDICTS = {True: "passed", False: "failed", None: "cannot be decided"}
MARKS = {True: "passed", False: "failed", None: "failed"}  # classes of the page's style


def gates_as_html(
    title: str,
    sentence: str,
    results: Sequence[GateResult],
    off: Sequence[str] = (),
    *,
    overruled: bool = False,
) -> str:
    """Return what is to be promoted or was, the sentence of each gate that refuses it, and all gates.

    ``overruled`` says that a person has decided against the gates that refuse it.
    """
    refused = failures(results)
    but = "overruled by a person: " if overruled else ""
    reasons = "".join(f"<li><b>{_text(one.name)}</b> {but}{_text(one.sentence)}</li>" for one in refused)
    parts = [
        decision_as_html(title, sentence, passed=overruled or not refused),
        f"<ul>{reasons}</ul>" if reasons else "",
        _table(results, off) if results else "",
    ]
    return "".join(parts)


def decision_as_html(title: str, sentence: str, *, passed: bool) -> str:
    """Return what becomes of the policy, as the paragraph above the gates."""
    mark = MARKS[passed]
    return f'<p class="decision {mark}"><b>{_text(title)}</b> {_text(sentence)}</p>'


def _table(results: Sequence[GateResult], off: Sequence[str]) -> str:
    head = "<tr><th>gate</th><th>verdict</th><th>figure</th><th>threshold</th></tr>"
    rows = "".join(
        f"<tr><td>{_text(one.name)}</td><td class={MARKS[one.passed]}>{VERDICTS[one.passed]}</td>"
        f"<td>{_text(one.figure)}</td><td>{_text(one.threshold)}</td></tr>"
        for one in results
    )
    left = f'<p class="note">Gates that are off: {_text(", ".join(off))}</p>' if off else ""
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f'<details><summary>All gates</summary><div class="scroll">{table}</div>{left}</details>'


def _text(value: str) -> str:
    return html.escape(value)


def replace_gates(page: str, content: str) -> str:
    """Return the report with ``content`` in the place of what it says about the gates."""
    place = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    return place.sub(lambda _: f"{BEGIN}{content}{END}", page, count=1)


def replace_decision(page: str, content: str) -> str:
    """Return the report with another paragraph above the gates, which stay as they were."""
    place = re.compile(f'{re.escape(BEGIN)}(<p class="decision [a-z]+">.*?</p>)?', re.DOTALL)
    return place.sub(lambda _: f"{BEGIN}{content}", page, count=1)


def update_report(tracker: Tracker, run_id: str, flow_run_id: str, change: Callable[[str], str]) -> None:
    """Change the page of the report of a finished run: in MLflow, and in this home if it is there."""
    with tempfile.TemporaryDirectory() as folder:
        if found := tracker.download(run_id, REPORT, Path(folder)):
            found.write_text(change(found.read_text(encoding="utf-8")), encoding="utf-8")
            tracker.upload(run_id, found, None)
    kept = home() / "runs" / flow_run_id / REPORT
    if not flow_run_id or not kept.is_file():
        return
    before, last = kept.read_text(encoding="utf-8"), home() / REPORT
    is_last = last.is_file() and last.read_text(encoding="utf-8") == before
    for place in [kept, last] if is_last else [kept]:
        replace_text(place, change(before))
