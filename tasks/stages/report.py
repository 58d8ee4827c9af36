"""Draw one page about the whole run."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Kind, Step, without_weights
from tasks.config.jobs import ReportJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state, present

KIND: Kind = "cpu"


def step(config: Pipeline, *, data: Artifact, **others: Artifact) -> Step:
    artifacts = {"data": data, **others}
    return Step(
        "report",
        ReportJob.of(config),
        {name: without_weights(artifact) for name, artifact in artifacts.items()},
        kind=KIND,
    )


@task(name="report", **AS_TASK)
def run(
    config: Pipeline, *, context: RunContext, data: Artifact, **others: Artifact | Exception | None
) -> State:
    """Draw the page, of the stages that were built."""
    return as_state(run_stage(step(config, data=data, **present(others)), context))
