"""Train a policy with DPO on the pairs of the reward model."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import start_weights
from tasks.config.jobs import DpoJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(DpoJob, shown=("loss", "accuracy"))
def dpo(config: Pipeline, *, data: Artifact, model: Artifact, reference: Artifact) -> Inputs:
    """Train the policy with DPO."""
    return {
        "data": only(data, "reward.parquet", "evaluation_pairs.parquet", *config.samples.tables),
        "model": within(model, "model"),
        "reference": only(reference, "reference.parquet", "reference_evaluation.parquet"),
        **start_weights(config, "dpo"),
    }
