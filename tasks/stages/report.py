"""Draw one page about the whole run."""

from tasks.artifacts.artifact import Artifact, without_weights
from tasks.config.jobs import ReportJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(ReportJob, kind="cpu")
def report(config: Pipeline, *, data: Artifact, **others: Artifact) -> Inputs:
    """Draw the page, of the stages that were built."""
    del config
    return {name: without_weights(artifact) for name, artifact in {"data": data, **others}.items()}
