"""Judge the policies' answers: who wins, by which judge, and what that judge is worth."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.judge_model import judge_inputs
from tasks.config.jobs import WinrateJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage
from tasks.stages.weights import judge_files


@stage(WinrateJob)
def winrate(
    config: Pipeline, *, data: Artifact, model: Artifact, reward: Artifact, answers: Artifact
) -> Inputs:
    """Grade the judges on held-out votes, let them decide between answers, and count wins."""
    return {
        "data": only(data, "evaluation.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
        "reward": only(reward, *judge_files(config.reward), "reward.json"),
        "answers": only(answers, "answers.parquet"),
        **judge_inputs(config.judge),
    }
