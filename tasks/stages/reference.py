"""Compute the SFT model's log-probability of every compared answer: DPO's reference."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import ReferenceJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state


def step(config: Pipeline, *, data: Artifact, model: Artifact) -> Step:
    inputs = {
        "data": only(data, "reward.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
    }
    return Step("reference", ReferenceJob.of(config), inputs)


@task(name="reference", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, data: Artifact, model: Artifact) -> State:
    """Compute DPO's reference log-probabilities."""
    return as_state(run_stage(step(config, data=data, model=model), context))
