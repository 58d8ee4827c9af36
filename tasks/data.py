"""A dump's posts as scored, paired and split tables."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.programs.config import DataJob, Pipeline
from tasks.stage import AS_TASK, Artifact, Seat, Step, as_state, run_stage, within


def step(config: Pipeline, *, posts: Artifact) -> Step:
    return Step("data", DataJob.of(config), {"posts": within(posts, "Posts.xml")})


@task(name="data", **AS_TASK)
def run(config: Pipeline, *, seat: Seat, posts: Artifact) -> State:
    """Read, score, pair and split the posts."""
    return as_state(run_stage(step(config, posts=posts), seat))
