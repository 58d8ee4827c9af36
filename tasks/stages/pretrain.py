"""Train the built-in base: a tokenizer and a small Llama, from scratch."""

from tasks.artifacts.artifact import Artifact, only
from tasks.config.jobs import PretrainJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(PretrainJob, shown=("loss",))
def pretrain(config: Pipeline, *, data: Artifact) -> Inputs:
    """Train the base model."""
    del config
    return {"data": only(data, "corpus.parquet")}
