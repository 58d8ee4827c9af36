"""Mix votes with the comparisons of all rounds."""

from tasks.artifacts.artifact import Artifact, only
from tasks.config.jobs import MixtureJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(MixtureJob, kind="cpu")
def mixture(config: Pipeline, *, data: Artifact, **others: Artifact) -> Inputs:
    """Mix the votes with the comparisons of each round: ``comparisons1``, ``comparisons2`` and so on."""
    rounds = {
        name: only(one, "comparisons.parquet")
        for name, one in others.items()
        if name.startswith("comparisons")
    }
    votes = {"data": only(data, "reward.parquet")} if config.rounds.old_share else {}
    return {**votes, **rounds}
