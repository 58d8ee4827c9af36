"""Compare the trained policies with each other, the SFT model and the chosen answers."""

from prefect import task
from prefect.client.schemas.objects import State

from tasks.artifacts.artifact import Artifact, Step, only, within
from tasks.config.jobs import WinrateJob
from tasks.config.pipeline import Pipeline
from tasks.execution.run_stage import RunContext, run_stage
from tasks.stages.task import AS_TASK, as_state, not_ready, present
from tasks.stages.weights import PLACES, places


def step(
    config: Pipeline, *, data: Artifact, model: Artifact, reward: Artifact, **policies: Artifact
) -> Step:
    inputs = {
        "data": only(data, "evaluation.parquet"),
        "model": within(model, "model"),
        "reward": only(reward, *places(config.reward), "reward.json"),
    }
    left = {"ppo": PLACES["lora"], "dpo": places(config.dpo)}
    return Step(
        "winrate",
        WinrateJob.of(config),
        inputs | {name: only(policy, *left[name]) for name, policy in policies.items()},
    )


@task(name="winrate", **AS_TASK)
def run(
    config: Pipeline,
    *,
    context: RunContext,
    data: Artifact,
    model: Artifact,
    reward: Artifact,
    **policies: Artifact | Exception | None,
) -> State:
    """Let every policy that was trained answer held-out questions and count wins."""
    trained = present(policies)
    if not trained:
        return not_ready("No policy was trained.")
    return as_state(run_stage(step(config, data=data, model=model, reward=reward, **trained), context))
