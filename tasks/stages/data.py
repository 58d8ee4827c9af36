"""Turn posts with votes, or comparisons, into tables of pairs and splits."""

from tasks.artifacts.artifact import Artifact, within
from tasks.artifacts.corpus import evaluation_sets, users_artifact, with_site
from tasks.config.jobs import DataJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(DataJob, kind="cpu", complete=with_site)
def data(config: Pipeline, *, source: Artifact) -> Inputs:
    """Read, score, pair and split the posts of the source."""
    posts = {"source": within(source, "Posts.xml")}
    return posts | users_artifact(config.source, source) | evaluation_sets(config)
