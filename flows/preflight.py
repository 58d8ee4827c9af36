"""What can be known to be wrong before anything starts. Every refusal is an InputError with one sentence."""

import os
import shutil
from pathlib import Path

from tasks.artifacts.base_model import model_folder
from tasks.artifacts.corpus import corpus_place, evaluation_sets
from tasks.config.models import HuggingFaceBase
from tasks.config.pipeline import Pipeline
from tasks.config.sources import ShellSite
from tasks.execution.tokenizer_check import check_tokenizer
from tasks.stages.weights import starts
from tasks.system.errors import InputError

LEAST_FREE_MB = 200


def check_inputs(config: Pipeline) -> None:
    """The data and the model that the settings name."""
    if not isinstance(config.source, ShellSite):
        corpus_place(config.source)
    evaluation_sets(config)
    if isinstance(config.base, HuggingFaceBase):
        check_tokenizer(model_folder(config.base), config.text)
    for stage in ("sft", "reward", "dpo"):
        starts(config, stage)


def check_places(home: Path, summary: Path | None) -> None:
    """Where things are to be written."""
    above = next(folder for folder in (home, *home.parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{above} cannot be written to; ALIGNFLOW_HOME names another place for what is made")
    free_mb = shutil.disk_usage(above).free // 2**20
    if free_mb < LEAST_FREE_MB:
        raise InputError(
            f"The disk under {above} is nearly full: {free_mb} MB are free, {LEAST_FREE_MB} MB is the least to start with"
        )
    if summary and (
        summary.is_dir() or (not summary.absolute().parent.is_dir() and summary.absolute().parent != home)
    ):
        raise InputError(f"--summary: {summary} cannot be written; its folder must exist")
