"""Write the report of the whole run as one self-contained page: win rates, sample answers, curves, data.

python -m tasks.programs.report DIR

inputs    the artifact of every stage of the run that was built
artifact  report.html, card.html, summary.json

The page does not depend on the clock or the machine: equal artifacts give equal bytes. The flow replaces one
comment of the template by the run's table of stages.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.config.data import Data
from tasks.config.jobs import ReportJob
from tasks.programs.runtime.program import Run, main, read_summary
from tasks.reporting import (
    benchmark_tables,
    data_card,
    reward_charts,
    stage_charts,
    training_samples,
    truncation_charts,
)
from tasks.reporting.evaluation_view import build_evaluation
from tasks.reporting.run_report import build_stage, group_stages, read_samples, render


def build_report(job: ReportJob, run: Run) -> None:  # noqa: ARG001 - the page has no settings
    """Write the report and the data card."""
    run.rewind(0)
    folders = {name: folder for name, folder in run.inputs.items() if (folder / "summary.json").is_file()}
    summaries = {name: read_summary(folder) for name, folder in folders.items()}
    metrics = {name: summary["metrics"] for name, summary in summaries.items()}
    card = json.loads((folders["data"] / "card.json").read_text(encoding="utf-8"))
    results = _read_results(folders)
    cuts = truncation_charts.build_rows(metrics)
    card_page = data_card.render(card, descriptions=Data.descriptions(), cuts=cuts)
    (run.artifact / "card.html").write_text(card_page, encoding="utf-8")
    names = [name for name in stage_charts.TITLES if name in folders]
    stages = [build_stage(name, folders[name], metrics[name]) for name in names]
    page = render(
        card=card,
        cells=group_stages(stages),
        samples=(
            read_samples(folders["winrate"], folders["data"], [judge["name"] for judge in results["judges"]])
            if "winrate" in folders
            else []
        ),
        questions=summaries["winrate"]["questions"] if "winrate" in summaries else 0,
        warnings=[(name, text) for name, summary in summaries.items() for text in summary["warnings"]],
        cuts=cuts,
        training_samples=training_samples.render_section(folders),
        costs=benchmark_tables.build_rows(_read_benchmarks(folders)),
        reward_scores=benchmark_tables.build_scores(metrics.get("benchmarks", {})),
        **build_evaluation(metrics, results, _describe_pairs(summaries)),
    )
    (run.artifact / "report.html").write_bytes(page)
    run.log(1, 1)
    run.finish({"report.bytes": len(page)})


def _read_results(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return what the win rates were counted from; nothing if a failed stage left no policy to compare."""
    if "winrate" not in folders:
        return {"judges": [], "tallies": {}, "leaderboard": {}, "policies": []}
    results: dict[str, Any] = json.loads((folders["winrate"] / "results.json").read_text())
    return results


def _read_benchmarks(folders: Mapping[str, Path]) -> dict[str, Any]:
    """Return the figures of the stage benchmarks; nothing if it failed."""
    if "benchmarks" not in folders:
        return {"models": [], "rows": []}
    results: dict[str, Any] = json.loads((folders["benchmarks"] / "results.json").read_text())
    return results


def _describe_pairs(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return which pairs each accuracy on votes was measured on."""
    stages = {"reward_accuracy.votes": "reward", "dpo.implicit_accuracy": "dpo"}
    return {
        metric: reward_charts.describe_pairs(summaries[stage])
        for metric, stage in stages.items()
        if stage in summaries
    }


if __name__ == "__main__":
    main(build_report, ReportJob)
