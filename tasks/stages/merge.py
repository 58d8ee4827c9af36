"""Merge the fine-tuned adapter into its base model."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import MergeJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state
from tasks.stages.weights import places


def step(config: Pipeline, *, base: Artifact, adapter: Artifact) -> Step:
    return Step(
        "merge",
        MergeJob.of(config),
        {"base": within(base, "model"), "adapter": only(adapter, *places(config.sft))},
    )


@task(name="merge", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, base: Artifact, adapter: Artifact) -> State:
    """Merge the adapter into the base model."""
    return as_state(run_stage(step(config, base=base, adapter=adapter), context))
