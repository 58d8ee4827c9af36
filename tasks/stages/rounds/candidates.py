"""Let the last policies answer prompts, and score the answers with the last reward model."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.weight_files import only_weights, weight_files
from tasks.config.jobs import CandidatesJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(CandidatesJob)
def candidates(config: Pipeline, *, data: Artifact, model: Artifact, **others: Artifact) -> Inputs:
    """Sample the answers that are compared: of ``policy``, ``policy2`` and so on, the newest first, and of
    the SFT model if the settings say so or there is none. ``reward`` scores them.
    """
    policies = {name: only_weights(one) for name, one in others.items() if name.startswith("policy")}
    scored = {}
    if "reward" in others:
        scored["reward"] = only(others["reward"], *weight_files(config.reward), "reward.json")
    return {
        "data": only(data, "rl.parquet"),
        "model": within(model, "model"),
        **policies,
        **scored,
    }
