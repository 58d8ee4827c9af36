"""Compute the SFT model's log-probability of every compared answer: DPO's reference."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.config.jobs import ReferenceJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(ReferenceJob)
def reference(config: Pipeline, *, data: Artifact, model: Artifact) -> Inputs:
    """Compute DPO's reference log-probabilities."""
    del config
    return {
        "data": only(data, "reward.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
    }
