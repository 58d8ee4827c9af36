"""Train a reward model on pairs of answers: PPO's reward, and a judge."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import start_weights
from tasks.config.jobs import RewardJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(RewardJob, shown=("loss", "accuracy"))
def reward(config: Pipeline, *, data: Artifact, model: Artifact) -> Inputs:
    """Train the reward model."""
    compared = "reward.parquet" if config.reward.comparisons == "pairs" else "reward_groups.parquet"
    return {
        "data": only(data, compared, "finetune.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
        **start_weights(config, "reward"),
    }
