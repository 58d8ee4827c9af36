"""One self-contained page about the whole run: who beat whom, sample answers, curves, data.

python -m tasks.programs.report DIR        inputs: the artifact of every stage of the run that was built        artifact: report.html, card.html, summary.json

Nothing on the page depends on the clock or the machine: equal artifacts give equal bytes. The run's stage table is filled in by the flow, in
place of the one comment that the template leaves for it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.config.data import Data
from tasks.config.jobs import ReportJob
from tasks.programs.runtime.program import Run, main, read_summary
from tasks.reporting import data_card, reward_charts, stage_charts, truncation_charts
from tasks.reporting.run_report import evaluation, render, sample_answers, stage_section, table_cells


def report(job: ReportJob, run: Run) -> None:  # noqa: ARG001 - the page has no settings
    """Draw one self-contained page about the run."""
    run.rewind(0)
    found = {name: folder for name, folder in run.inputs.items() if (folder / "summary.json").is_file()}
    metrics = {name: read_summary(folder)["metrics"] for name, folder in found.items()}
    about = json.loads((found["data"] / "card.json").read_text(encoding="utf-8"))
    cuts = truncation_charts.rows_of(metrics)
    (run.artifact / "card.html").write_text(
        data_card.page(about, descriptions=Data.descriptions(), cuts=cuts), encoding="utf-8"
    )
    page = render(
        card=about,
        cells=table_cells(
            [stage_section(name, found[name], metrics[name]) for name in stage_charts.TITLES if name in found]
        ),
        samples=sample_answers(found["winrate"], found["data"]) if "winrate" in found else [],
        questions=read_summary(found["winrate"])["questions"] if "winrate" in found else 0,
        warnings=[
            (name, sentence)
            for name, folder in found.items()
            for sentence in read_summary(folder)["warnings"]
        ],
        cuts=cuts,
        **evaluation(metrics, _results(found), _judged_on(found)),
    )
    (run.artifact / "report.html").write_bytes(page)
    run.log(1, 1)
    run.finish({"report.bytes": len(page)})


def _results(found: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the win rates were counted from; nothing if a failed stage left no policy to compare."""
    if "winrate" not in found:
        return {"tallies": {}, "policies": []}
    results: dict[str, Any] = json.loads((found["winrate"] / "results.json").read_text())
    return results


def _judged_on(found: Mapping[str, Path]) -> dict[str, str]:
    """Which pairs each accuracy that rests on votes is of."""
    stages = {"reward_accuracy.votes": "reward", "dpo.implicit_accuracy": "dpo"}
    return {
        name: reward_charts.judged_on(read_summary(found[stage]))
        for name, stage in stages.items()
        if stage in found
    }


if __name__ == "__main__":
    main(report, ReportJob)
