"""Compare finished runs: the figures of each, and a judge's verdicts between their policies' answers."""

import re

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.judge_model import judge_inputs
from tasks.artifacts.weight_files import judge_files
from tasks.config.commands.comparison import CompareJob, Comparison
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage

READ = {"answers": "answers.parquet", "winrate": "verdicts.parquet", "benchmarks": "perplexity.parquet"}


@stage(CompareJob)
def compare(config: Pipeline, **artifacts: Artifact) -> Inputs:
    """Compare runs question by question; no answers are sampled.

    The artifacts of the first run are answers1, winrate1 and benchmarks1, of which a run may lack the last
    two; if a reward model judges, they are joined by that one and its model.
    """
    assert isinstance(config, Comparison)
    found = {}
    for name, artifact in artifacts.items():
        if numbered := re.fullmatch(r"([a-z]+)\d+", name):
            found[name] = only(artifact, READ[numbered[1]])
    if config.judged_by and config.judged_by.name in ("held_out", "reward"):
        found["model"] = within(artifacts["model"], "model")
        found["reward"] = only(artifacts["reward"], *judge_files(config.reward), "reward.json")
    return found | judge_inputs(config.judge)
