"""Find and check the benchmark files that the user brings, and make them inputs of the stage benchmarks."""

import os
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.config.benchmark_files import PREFIX, benchmark_name, read_benchmark, read_reward_bench
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError


def benchmark_inputs(config: Pipeline) -> dict[str, Artifact]:
    """Return the files of benchmarks.files as inputs, by their names. Raises InputError."""
    return {f"{PREFIX}{name}": user_artifact(path) for name, path in _find_files(config).items()}


def reward_bench_input(config: Pipeline) -> dict[str, Artifact]:
    """Return the file of benchmarks.reward_bench as an input; nothing if none is set. Raises InputError."""
    path = config.benchmarks.reward_bench
    return {"reward_bench": user_artifact(_find(path, "benchmarks.reward_bench"))} if path else {}


def check_benchmark_files(config: Pipeline) -> None:
    """Refuse benchmark files that are missing or malformed, before anything runs. Raises InputError."""
    for path in _find_files(config).values():
        read_benchmark(path)
    if rewarded := config.benchmarks.reward_bench:
        read_reward_bench(_find(rewarded, "benchmarks.reward_bench"))


def _find_files(config: Pipeline) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in config.benchmarks.files:
        path = _find(text, "benchmarks.files")
        if (name := benchmark_name(path)) in found:
            raise InputError(
                f"benchmarks.files: {found[name]} and {path} would both be called {name}; rename one of them"
            )
        found[name] = path
    return found


def _find(text: str, setting: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{setting}: there is no file {path} that can be read")
    return path
