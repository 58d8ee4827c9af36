"""Train a reward model on pairs of answers: PPO's reward, and a judge."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import start_weights
from tasks.config.jobs import RewardJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(RewardJob, shown=("loss", "accuracy"))
def reward(config: Pipeline, *, data: Artifact, model: Artifact, **others: Artifact) -> Inputs:
    """Train the reward model, in rounds on the ``mixture`` of votes and comparisons in place of the votes."""
    votes = "reward.parquet" if config.reward.comparisons == "pairs" else "reward_groups.parquet"
    mixture = {"mixture": only(others["mixture"], "reward.parquet")} if "mixture" in others else {}
    return {
        "data": only(data, *([] if mixture else [votes]), "finetune.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
        **mixture,
        **start_weights(config, "reward"),
    }
