"""Generate the built-in site: a Posts.xml with questions, answers and votes."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Kind, Step
from tasks.config.jobs import SiteJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state

KIND: Kind = "cpu"


def step(config: Pipeline) -> Step:
    return Step("site", SiteJob.of(config), {}, kind=KIND)


@task(name="site", **AS_TASK)
def run(config: Pipeline, *, context: RunContext) -> State:
    """Generate the site."""
    return as_state(run_stage(step(config), context))
