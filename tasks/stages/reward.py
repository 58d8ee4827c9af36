"""Train a reward model on pairs of answers: PPO's reward, and a judge."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import RewardJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state
from tasks.stages.weights import starts


def step(config: Pipeline, *, data: Artifact, model: Artifact) -> Step:
    compared = "reward.parquet" if config.reward.comparisons == "pairs" else "reward_groups.parquet"
    inputs = {
        "data": only(data, compared, "finetune.parquet", "evaluation_pairs.parquet"),
        "model": within(model, "model"),
        **starts(config, "reward"),
    }
    return Step("reward", RewardJob.of(config), inputs, shown=("loss", "accuracy"))


@task(name="reward", **AS_TASK)
def run(config: Pipeline, *, context: RunContext, data: Artifact, model: Artifact) -> State:
    """Train the reward model."""
    return as_state(run_stage(step(config, data=data, model=model), context))
