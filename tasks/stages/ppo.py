"""Train a policy with PPO against the reward model."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.mixed_text import mixed_text
from tasks.artifacts.weight_files import judge_files, weight_files
from tasks.config.jobs import PpoJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(PpoJob, shown=("reward", "kl"))
def ppo(config: Pipeline, *, data: Artifact, model: Artifact, reward: Artifact) -> Inputs:
    """Train the policy with PPO."""
    finetune = ["finetune.parquet"] if config.ppo.ptx.is_on and not config.ppo.ptx.path else []
    reward_files = judge_files if config.ppo.score.by == "held_out" else weight_files
    return {
        "data": only(data, "rl.parquet", *finetune, *config.samples.tables),
        "model": within(model, "model"),
        "reward": only(reward, *reward_files(config.reward), "reward.json"),
        **mixed_text(config),
    }
