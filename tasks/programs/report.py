"""Write the report of the whole run as one self-contained page, and a model card for each policy.

python -m tasks.programs.report DIR

inputs    the artifact of every stage of the run that was built; comparisons1, comparisons2, ... of earlier
          rounds
artifact  report.html, card.html     the report and the data card
          model-cards/POLICY/README.md
          headline.json              what the report begins with
          summary.json

The files do not depend on the clock or the machine: equal artifacts give equal bytes. At the end of a run the
flow fills in what is in no key: which run it is, its settings and stages, and what the gates say.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.config.jobs import ReportJob
from tasks.config.sections.data import Data
from tasks.programs.runtime.program import Run, main, read_summary, to_json
from tasks.reporting import (
    benchmark_tables,
    data_card,
    reward_charts,
    stage_panels,
    training_samples,
    truncation_charts,
)
from tasks.reporting.evaluation.headline import as_json
from tasks.reporting.evaluation.policies import TRAINED
from tasks.reporting.evaluation.view import build_evaluation
from tasks.reporting.model_card import labelling
from tasks.reporting.model_card.model_card import Measured, render_model_card
from tasks.reporting.run_report import build_stage, group_stages, read_samples, render


def build_report(job: ReportJob, run: Run) -> None:  # noqa: ARG001 - the page has no settings
    """Write the report, the data card and the model cards."""
    run.rewind(0)
    all_folders = {name: folder for name, folder in run.inputs.items() if (folder / "summary.json").is_file()}
    all_summaries = {name: read_summary(folder) for name, folder in all_folders.items()}
    folders = {name: folder for name, folder in all_folders.items() if not labelling.is_earlier(name)}
    summaries = {name: all_summaries[name] for name in folders}
    metrics = {name: summary["metrics"] for name, summary in summaries.items()}
    warnings = {name: summary["warnings"] for name, summary in summaries.items()}
    card = json.loads((folders["data"] / "card.json").read_text(encoding="utf-8"))
    results, benchmarks = _read_results(folders), _read_benchmarks(folders)
    cuts = truncation_charts.build_rows(metrics)
    card_page = data_card.render(card, descriptions=Data.descriptions(), cuts=cuts)
    (run.artifact / "card.html").write_text(card_page, encoding="utf-8")
    names = [name for name in stage_panels.TITLES if name in folders]
    stages = [build_stage(name, folders[name], metrics[name]) for name in names]
    evaluation = build_evaluation(metrics, results, _describe_pairs(summaries), warnings)
    page = render(
        card=card,
        cells=group_stages(stages),
        samples=(
            read_samples(folders["winrate"], folders["data"], [judge["name"] for judge in results["judges"]])
            if "winrate" in folders
            else []
        ),
        questions=summaries["winrate"]["questions"] if "winrate" in summaries else 0,
        warnings=[(name, text) for name, texts in warnings.items() for text in texts],
        cuts=cuts,
        training_samples=training_samples.render_section(folders),
        costs=benchmark_tables.build_rows(benchmarks),
        reward_scores=benchmark_tables.build_scores(metrics.get("benchmarks", {})),
        **evaluation,
    )
    (run.artifact / "report.html").write_bytes(page)
    (run.artifact / "headline.json").write_text(to_json(as_json(evaluation["headline"]), indent=1))
    all_metrics = {name: value for stage in metrics.values() for name, value in stage.items()}
    measured = Measured(
        all_metrics,
        _hide_raters(warnings, folders),
        evaluation["judges"],
        benchmarks["rows"],
        labelling.collect_rounds(all_summaries),
    )
    for policy in TRAINED:
        if policy in folders:
            is_adapter = (folders[policy] / "adapter").is_dir()
            text = render_model_card(policy, card, measured, is_adapter=is_adapter)
            folder = run.artifact / "model-cards" / policy
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "README.md").write_text(text, encoding="utf-8")
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


def _hide_raters(warnings: Mapping[str, list[str]], folders: Mapping[str, Path]) -> dict[str, list[str]]:
    """Return the warnings by stage without the names of the people who have labelled."""
    if labelling.STAGE not in folders:
        return dict(warnings)
    agreement = json.loads((folders[labelling.STAGE] / "agreement.json").read_text(encoding="utf-8"))
    names = [one["name"] for one in agreement["raters"]]
    return {**warnings, labelling.STAGE: labelling.hide_names(warnings[labelling.STAGE], names)}


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
