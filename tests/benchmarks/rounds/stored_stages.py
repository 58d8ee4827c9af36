"""Run stages, and whole rounds, into the store of a home as `alignflow rounds` does, without its servers.

The walk, the settings, the seeds and the programs are those of the flow, so the artifacts are too. Left out
are the stages that compare policies: a benchmark does that itself, on the same questions for all of them.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from flows.pipeline import prepare
from tasks.artifacts.artifact import Artifact
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.rounds.round_walk import Prepared, Round, collect_candidates, finish_round, seeded_stages
from tasks.stages.stage import Stage
from tasks.tracking.client import URI, process_tracker
from tasks.tracking.remote_artifacts import locate

LEFT_OUT = ("answers", "winrate", "benchmarks")
ROUND_0 = Round(0, policy=None, reward=None, asked=None, comparisons=None, run_id=None, metrics={})


class BuiltRound(NamedTuple):
    """A finished round: what later rounds know of it, and its artifacts by stage."""

    round: Round
    built: dict[str, Artifact]


def open_home(folder: Path) -> None:
    """Make ``folder`` the home of this process and of the programs that it starts."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["ALIGNFLOW_HOME"] = str(folder)
    os.environ.pop(URI, None)  # artifacts of another home would be fetched instead of built


def find(artifact: Artifact) -> Path:
    """Return the folder of an artifact of this home."""
    return locate(artifact, process_tracker())


def build(config: Pipeline, stage: Stage, **inputs: Artifact) -> Artifact:
    """Return the artifact of a stage: the stored one, or a newly built one."""
    return run_stage(stage.step(config, **inputs), RunContext(config.machine))


def build_base(config: Pipeline) -> Prepared:
    """Return data, base and SFT model."""
    return Prepared(*prepare(config, partial(build, config)))


def build_round(config: Pipeline, number: int, prepared: Prepared, before: Sequence[Round]) -> BuiltRound:
    """Return round ``number``; ``before`` are the earlier ones, oldest first, from ROUND_0 on."""
    seeded = seeded_stages(config, number)
    built: dict[str, Artifact] = {}

    def run(stage: Stage, **inputs: Artifact) -> Artifact | None:
        if stage.name in LEFT_OUT:
            return None
        built[stage.name] = build(seeded.get(stage.name, config), stage, **inputs)
        return built[stage.name]

    to_label = collect_candidates(config, prepared, before, run)
    finish_round(config, prepared, before, to_label, None, run, {})
    metrics: dict[str, Any] = {}
    for artifact in built.values():
        metrics |= artifact["metrics"]
    one = Round(
        number,
        policy=built["ppo"],
        reward=built["reward"],
        asked=built["asked"],
        comparisons=built["comparisons"],
        run_id=None,
        metrics=metrics,
    )
    return BuiltRound(one, built)
