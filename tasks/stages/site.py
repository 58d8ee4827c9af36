"""Generate the built-in site: a Posts.xml with questions, answers and votes."""

from tasks.config.jobs import SiteJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(SiteJob, kind="cpu")
def site(config: Pipeline) -> Inputs:
    """Generate the site."""
    del config
    return {}
