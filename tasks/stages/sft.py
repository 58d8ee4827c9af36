"""Fine-tune the base model on the best answer of each question."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import SftJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state
from tasks.stages.weights import starts


def step(config: Pipeline, *, data: Artifact, base: Artifact) -> Step:
    inputs = {"data": only(data, "finetune.parquet"), "base": within(base, "model"), **starts(config, "sft")}
    return Step("sft", SftJob.of(config), inputs, shown=("loss", "held_out_loss"))


@task(name="sft", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, data: Artifact, base: Artifact) -> State:
    """Fine-tune the base model."""
    return as_state(run_stage(step(config, data=data, base=base), context))
