"""Train a policy with PPO against the reward model."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import PpoJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state
from tasks.stages.weights import places


def step(config: Pipeline, *, data: Artifact, model: Artifact, reward: Artifact) -> Step:
    inputs = {
        "data": only(data, "rl.parquet"),
        "model": within(model, "model"),
        "reward": only(reward, *places(config.reward), "reward.json"),
    }
    return Step("ppo", PpoJob.of(config), inputs, shown=("reward", "kl"))


@task(name="ppo", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, data: Artifact, model: Artifact, reward: Artifact) -> State:
    """Train the policy with PPO."""
    return as_state(run_stage(step(config, data=data, model=model, reward=reward), context))
