"""Fine-tune the base model on the best answer of each question."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import start_weights
from tasks.config.jobs import SftJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(SftJob, shown=("loss", "held_out_loss"))
def sft(config: Pipeline, *, data: Artifact, base: Artifact) -> Inputs:
    """Fine-tune the base model."""
    return {
        "data": only(data, "finetune.parquet", *config.samples.tables),
        "base": within(base, "model"),
        **start_weights(config, "sft"),
    }
