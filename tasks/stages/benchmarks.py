"""Measure what alignment costs: perplexity of held-out answers, and benchmarks, of every model of the run."""

from tasks.artifacts.artifact import Artifact, only, within
from tasks.artifacts.benchmark_files import benchmark_inputs, reward_bench_input
from tasks.artifacts.weight_files import WEIGHT_FILES, weight_files
from tasks.config.jobs import BenchmarksJob
from tasks.config.pipeline import Pipeline
from tasks.stages.stage import Inputs, stage


@stage(BenchmarksJob)
def benchmarks(
    config: Pipeline, *, data: Artifact, base: Artifact, model: Artifact, **others: Artifact
) -> Inputs:
    """Measure the base, the SFT model and the policies that were trained on the same texts."""
    files = {"ppo": WEIGHT_FILES["lora"], "dpo": weight_files(config.dpo)}
    policies = {name: only(others[name], *files[name]) for name in files if name in others}
    rewarded = reward_bench_input(config) if "reward" in others else {}
    if rewarded:
        rewarded["reward"] = only(others["reward"], *weight_files(config.reward), "reward.json")
    return {
        "data": only(data, "evaluation.parquet"),
        "base": within(base, "model"),
        "model": within(model, "model"),
        **policies,
        **benchmark_inputs(config),
        **rewarded,
    }
