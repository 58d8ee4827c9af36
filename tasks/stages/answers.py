"""Let the base model and every trained policy answer held-out questions."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.config.jobs import AnswersJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, NothingToDo, stage
from tasks.stages.weights import WEIGHT_FILES, weight_files


@stage(AnswersJob)
def answers(
    config: Pipeline, *, data: Artifact, base: Artifact, model: Artifact, **policies: Artifact
) -> Inputs:
    """Sample an answer of each policy to each held-out question."""
    if not policies:
        raise NothingToDo("No policy was trained.")
    files = {"ppo": WEIGHT_FILES["lora"], "dpo": weight_files(config.dpo)}
    return {
        "data": only(data, "evaluation.parquet"),
        "base": within(base, "model"),
        "model": within(model, "model"),
        **{name: only(policy, *files[name]) for name, policy in policies.items()},
    }
