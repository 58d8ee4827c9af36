"""Compare the trained policies with each other, the SFT model and the chosen answers."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.config.jobs import WinrateJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, NothingToDo, stage
from tasks.stages.weights import WEIGHT_FILES, weight_files


@stage(WinrateJob)
def winrate(
    config: Pipeline, *, data: Artifact, model: Artifact, reward: Artifact, **policies: Artifact
) -> Inputs:
    """Let every policy that was trained answer held-out questions and count wins."""
    if not policies:
        raise NothingToDo("No policy was trained.")
    files = {"ppo": WEIGHT_FILES["lora"], "dpo": weight_files(config.dpo)}
    return {
        "data": only(data, "evaluation.parquet"),
        "model": within(model, "model"),
        "reward": only(reward, *weight_files(config.reward), "reward.json"),
        **{name: only(policy, *files[name]) for name, policy in policies.items()},
    }
