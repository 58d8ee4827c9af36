"""Merge the fine-tuned adapter into its base model."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import weight_files
from tasks.config.jobs import MergeJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(MergeJob)
def merge(config: Pipeline, *, base: Artifact, adapter: Artifact) -> Inputs:
    """Merge the adapter into the base model."""
    return {"base": within(base, "model"), "adapter": only(adapter, *weight_files(config.sft))}
