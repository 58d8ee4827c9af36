"""Draw one page about the whole run."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, without_weights
from tasks.config.jobs import ReportJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state


def step(config: Pipeline, **artifacts: Artifact) -> Step:
    return Step(
        "report",
        ReportJob.of(config),
        {name: without_weights(artifact) for name, artifact in artifacts.items()},
        kind="cpu",
    )


@task(name="report", **AS_TASK)
def run(config: Pipeline, *, seat: RunContext, **artifacts: Artifact) -> State:
    """Draw the page."""
    return as_state(run_stage(step(config, **artifacts), seat))
