"""Label pairs: by the gold scorer, a judge, a file or people."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.judge_model import judge_inputs
from tasks.artifacts.weight_files import judge_files
from tasks.config.jobs import ComparisonsJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(ComparisonsJob)
def comparisons(config: Pipeline, *, asked: Artifact, **others: Artifact) -> Inputs:
    """Label the asked pairs, and make comparisons of the labels.

    ``labels`` is a file of rows; ``model`` and ``reward`` are read only if the member
    of the reward model labels that PPO never sees.
    """
    labels = config.rounds.labels
    inputs = {"asked": only(asked, "asked.parquet")}
    if labels.kind in ("file", "people"):
        return inputs | {"labels": others["labels"]}
    if labels.kind == "judge" and labels.by == "lm":
        return inputs | judge_inputs(config.judge)
    if labels.kind == "judge":
        inputs["model"] = within(others["model"], "model")
        inputs["reward"] = only(others["reward"], *judge_files(config.reward), "reward.json")
    return inputs
