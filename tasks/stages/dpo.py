"""Train a policy with DPO on the pairs of the reward model."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import DpoJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state
from tasks.stages.weights import starts


def step(config: Pipeline, *, data: Artifact, model: Artifact, reference: Artifact) -> Step:
    inputs = {
        "data": only(data, "reward.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
        "reference": only(reference, "reference.parquet", "reference_evaluation.parquet"),
    }
    return Step("dpo", DpoJob.of(config), inputs | starts(config, "dpo"), shown=("loss", "accuracy"))


@task(name="dpo", **AS_TASK)
def run(
    config: Pipeline, *, context: RunContext, data: Artifact, model: Artifact, reference: Artifact
) -> State:
    """Train the policy with DPO."""
    return as_state(run_stage(step(config, data=data, model=model, reference=reference), context))
