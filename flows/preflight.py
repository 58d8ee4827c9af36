"""Check before anything starts what can be checked then. Every refusal is an InputError with one sentence."""

import os
import shutil
from pathlib import Path

from flows.extras import may_be_stored
from flows.services import environment
from flows.services.processes import check_prefect
from tasks.artifacts.base_model import find_model_folder
from tasks.artifacts.benchmark_files import check_benchmark_files
from tasks.artifacts.corpus import evaluation_sets, find_corpus
from tasks.artifacts.judge_model import check_judge_environment, judge_inputs
from tasks.artifacts.mixed_text import mixed_text
from tasks.artifacts.reward_sources import function_digests, reward_models
from tasks.artifacts.store import home
from tasks.artifacts.weight_files import start_weights
from tasks.config.machine import Launches
from tasks.config.pipeline import Pipeline
from tasks.config.sections.models import HuggingFaceBase
from tasks.config.sections.sources import ShellSite
from tasks.execution import accelerate_config
from tasks.execution.tokenizer_preflight import check_tokenizer
from tasks.promotion.finished_runs import connect
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker, process_tracker

LEAST_FREE_MB = 200


def check_inputs(config: Pipeline) -> None:
    """Refuse settings whose data, model or weights are missing or cannot be read. Raises InputError."""
    if not isinstance(config.source, ShellSite):
        find_corpus(config.source)
    evaluation_sets(config)
    check_benchmark_files(config)
    if isinstance(config.base, HuggingFaceBase):
        check_tokenizer(find_model_folder(config.base), config.text)
    judge_inputs(config.judge)
    for stage in ("sft", "reward", "dpo", "ppo"):
        start_weights(config, stage)
    mixed_text(config)
    reward_models(config.ppo.rewards)
    function_digests(config.ppo.rewards)
    if not config.pools.gpu:  # a worker's files are not known here
        for stage in Launches.model_fields:
            if (launch := config.machine.of(stage)).accelerate_config:
                accelerate_config.read(stage, launch)


def check_rounds(config: Pipeline) -> None:
    """Refuse settings that rounds cannot run with. Raises InputError."""
    try:
        config.check_rounds()
    except ValueError as error:
        raise InputError(str(error)) from None
    labels = config.rounds.labels
    if labels.kind == "file" and not Path(labels.path).expanduser().is_file():
        raise InputError(f"rounds.labels.path: there is no file {labels.path}")


def check_environment(config: Pipeline, profile: str, *, rounds: bool = False) -> None:
    """Refuse settings that need variables which are not set where their stage runs. Raises InputError.

    The program of the stage checks them again: a worker's environment is not known here. Stages that are
    stored need none.
    """
    if config.pools.gpu:
        return
    try:
        check_judge_environment(config.judge)
    except InputError:
        from flows.commands.plan import plan, plan_rounds

        if not may_be_stored():
            raise
        planned = plan_rounds(config, profile)[0] if rounds else plan(config, profile)
        judging = {"winrate", "ppo"} if config.ppo.score.by == "judge" else {"winrate"}
        labels = config.rounds.labels
        if labels.kind == "judge" and labels.by == "lm":
            judging.add("comparisons")
        if any(one.stage in judging and one.action != "reuse" for one in planned):
            raise


def check_places(root: Path, summary: Path | None) -> None:
    """Refuse a home or a summary that cannot be written. Raises InputError."""
    above = next(folder for folder in (root, *root.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{above} cannot be written to; ALIGNFLOW_HOME names another place")
    free_mb = shutil.disk_usage(above).free // 2**20
    if free_mb < LEAST_FREE_MB:
        raise InputError(
            f"The disk under {above} is nearly full: {free_mb} MB are free, {LEAST_FREE_MB} MB is the least "
            "to start with"
        )
    if summary and (
        summary.is_dir() or (not summary.absolute().parent.is_dir() and summary.absolute().parent != root)
    ):
        raise InputError(f"--summary: {summary} cannot be written; its folder must exist")


def require_tracker() -> Tracker:
    """Set this process up for MLflow, which holds runs and models, and connect. Raises InputError."""
    environment.use_running_servers(home())
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (home() / "mlflow.db").is_file():
        raise InputError(
            f"There are no runs in {home()}: `alignflow run` makes one; ALIGNFLOW_HOME or "
            "MLFLOW_TRACKING_URI names another place"
        )
    environment.prepare(home())
    tracker = process_tracker()
    connect(tracker)
    return tracker


def require_prefect_server() -> None:
    """Set this process up for the Prefect server that is running. Raises InputError and ServerFailed."""
    environment.use_running_servers(home())
    if not os.environ.get("PREFECT_API_URL"):
        raise InputError(
            "There is no Prefect server to use: `alignflow up` starts one, PREFECT_API_URL names another"
        )
    environment.prepare(home())
    check_prefect()
