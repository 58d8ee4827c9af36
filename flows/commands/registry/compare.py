"""`alignflow compare`: compare finished runs, by their own figures and by one judge of all their policies."""

import argparse
import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from flows.preflight import require_tracker
from tasks.artifacts.artifact import Artifact
from tasks.config.commands.comparison import Comparison
from tasks.config.machine import Machine
from tasks.system.errors import InputError
from tasks.system.files import replace_text
from tasks.tracking.client import Tracker

HELP = "Compare finished runs: what differs, who is best, and by how much that is shown."
EXAMPLE = "alignflow compare latest 3f2a:ppo,dpo --judge --html comparison.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow compare`."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="id of a run in MLflow or its first characters, its name, or latest; RUN:ppo,dpo for some of "
        "its policies only",
    )
    parser.add_argument(
        "--judge",
        metavar="JUDGE",
        nargs="?",
        const="auto",
        default="",
        help="have all policies judged against each other: by gold, lm, held_out or reward, or by that of a "
        "run, as in reward:RUN (default: the first of these that the runs have in common)",
    )
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page with the answers side by side"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> None:
    """Print the tables. Raises InputError and StageFailed."""
    page: Path | None = args.html and args.html.absolute()
    if page and (page.is_dir() or not os.access(page.parent, os.W_OK)):
        raise InputError(f"--html: {args.html} cannot be written; its folder must exist")
    tracker = require_tracker()
    from tasks.promotion import compared_runs
    from tasks.tracking.remote_artifacts import locate

    chosen = compared_runs.find_compared(tracker, args.runs)
    comparison, artifacts = compared_runs.prepare(tracker, chosen, args.judge)
    artifact = build(tracker, comparison, artifacts, quiet=args.json)
    folder = locate(artifact, tracker)
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    if page:
        replace_text(page, (folder / "comparison.html").read_text(encoding="utf-8"))
    if args.json:
        print(json.dumps(results, indent=1))
        return
    from flows.display.comparison_tables import print_comparison

    print_comparison(results)
    if page:
        print(f"\nThe page: {page}")


def build(
    tracker: Tracker, comparison: Comparison, artifacts: dict[str, Artifact], *, quiet: bool
) -> Artifact:
    """Return the artifact of the stage compare: a stored one, else built here and tracked as a run."""
    from flows.display.terminal import Screen, drawing
    from tasks.artifacts.judge_model import check_judge_environment
    from tasks.execution.launch import interruptible
    from tasks.execution.run_stage import RunContext, look_up, run_stage
    from tasks.stages.compare import compare
    from tasks.system import events
    from tasks.tracking import runs

    step = compare.step(comparison, **artifacts)
    if found := look_up(step, tracker):
        return found
    check_judge_environment(comparison.judge)
    names = " and ".join(one.name for one in comparison.runs)
    params = {"judge": comparison.judged_by.title if comparison.judged_by else "none"}
    tracked = runs.pipeline_run(
        tracker, f"compare {names}"[:200], params, source="alignflow compare", note=_note(comparison)
    )
    screen = nullcontext() if quiet else drawing(Screen(starting=""))
    with interruptible(), tracked as run, screen:
        events.tell("plan", stages=[step.stage])
        artifact = run_stage(step, RunContext(Machine(), run.run_id, tracker=tracker))
        run.log_summary(artifact["metrics"])
    return artifact


def _note(comparison: Comparison) -> str:
    """Return the description of the comparison's run in MLflow."""
    compared = [f"- {one.run_id}: {', '.join(one.policies)}" for one in comparison.runs]
    return "\n".join(["Compares the answers of finished runs:", "", *compared])
