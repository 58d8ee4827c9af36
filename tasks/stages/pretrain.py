"""Train the built-in base: a tokenizer and a small Llama, from scratch."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only
from tasks.config.jobs import PretrainJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state


def step(config: Pipeline, *, data: Artifact) -> Step:
    return Step("pretrain", PretrainJob.of(config), {"data": only(data, "corpus.parquet")}, shown=("loss",))


@task(name="pretrain", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, data: Artifact) -> State:
    """Train the base model."""
    return as_state(run_stage(step(config, data=data), context))
