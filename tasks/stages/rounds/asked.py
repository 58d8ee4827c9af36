"""Choose the pairs that are asked about."""

from tasks.artifacts.artifact import Artifact, only
from tasks.config.jobs import AskedJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(AskedJob, kind="cpu")
def asked(config: Pipeline, *, candidates: Artifact, **others: Artifact) -> Inputs:
    """Choose pairs of answers; ``before1``, ``before2`` and so on were asked in earlier rounds.

    ``data`` is read only if gold questions are mixed in.
    """
    before = {name: only(one, "asked.parquet") for name, one in others.items() if name.startswith("before")}
    mixes_in = AskedJob.of(config).gold_questions > 0
    data = {"data": only(others["data"], "finetune.parquet")} if mixes_in else {}
    return {"candidates": only(candidates, "candidates.parquet"), **before, **data}
