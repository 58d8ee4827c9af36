"""Train a policy with PPO against the reward model."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.judge_model import judge_inputs
from tasks.artifacts.mixed_text import mixed_text
from tasks.artifacts.reward_sources import function_digests, reward_models
from tasks.artifacts.weight_files import WEIGHT_FILES, judge_files, start_weights, weight_files
from tasks.config.jobs import PpoJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


def with_reward_code(job: PpoJob, **_: Artifact) -> PpoJob:
    """Return the job with digests of the user's reward functions, so that a changed one is built again."""
    return job.model_copy(update={"reward_code": function_digests(job.ppo.rewards)})


@stage(PpoJob, shown=("reward", "kl"), complete=with_reward_code)
def ppo(config: Pipeline, *, data: Artifact, model: Artifact, reward: Artifact, **others: Artifact) -> Inputs:
    """Train the policy with PPO, in rounds on from ``start``, the policy of the round before."""
    start = start_weights(config, "ppo")
    if "start" in others:
        start = {"start": only(others["start"], *WEIGHT_FILES["lora"])}
    mixes_answers = config.ppo.ptx.is_on and not config.ppo.ptx.path
    finetune = ["finetune.parquet"] if mixes_answers or config.ppo.rewards.parts else []
    reward_files = judge_files if config.ppo.score.by == "held_out" else weight_files
    return {
        "data": only(data, "rl.parquet", *finetune, *config.samples.tables),
        "model": within(model, "model"),
        "reward": only(reward, *reward_files(config.reward), "reward.json"),
        **start,
        **mixed_text(config),
        **(judge_inputs(config.judge) if config.ppo.score.by == "judge" else {}),
        **reward_models(config.ppo.rewards),
    }
