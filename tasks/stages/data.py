"""Turn posts with votes, or comparisons, into tables of pairs and splits."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Kind, Step, within
from tasks.artifacts.corpus import evaluation_sets, users_artifact, with_site
from tasks.config.jobs import DataJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state

KIND: Kind = "cpu"


def step(config: Pipeline, *, source: Artifact) -> Step:
    inputs = {
        "source": within(source, "Posts.xml"),
        **users_artifact(config.source, source),
        **evaluation_sets(config),
    }
    return Step("data", DataJob.of(with_site(config, source)), inputs, kind=KIND)


@task(name="data", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, source: Artifact) -> State:
    """Read, score, pair and split the posts of the source."""
    return as_state(run_stage(step(config, source=source), context))
