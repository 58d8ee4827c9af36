"""Refuse, before anything starts, what needs an extra of alignflow that is not installed."""

import os
from importlib.util import find_spec

from tasks.artifacts import code_version
from tasks.artifacts.store import home
from tasks.config.pipeline import Pipeline
from tasks.system.errors import InputError

EXTRAS = {
    "train": (
        "torch",
        "transformers",
        "peft",
        "safetensors",
        "tokenizers",
        "accelerate",
        "datasets",
        "scipy",
    ),
    "gpu": ("bitsandbytes",),
    "server": ("flask_wtf",),  # what mlflow[auth] adds to mlflow
    "dask": ("distributed",),
    "ray": ("ray",),
    "benchmarks": ("lm_eval",),
    "serve": ("openai", "uvicorn", "fastapi"),  # what transformers[serving] adds to transformers
}


def missing_packages(extra: str) -> list[str]:
    """Return the packages of an extra that cannot be imported here."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def check_packages(config: Pipeline) -> None:
    """Refuse settings that need packages which are not installed here. Raises InputError."""
    for cluster in ("dask", "ray"):
        if getattr(config.machine, cluster) and missing_packages(cluster):
            raise _refusal(cluster, f"machine.{cluster}")
    if config.pools.gpu:  # only its workers need the rest
        return
    if config.benchmarks.files and missing_packages("benchmarks"):
        raise _refusal("benchmarks", "benchmarks.files")
    for name in ("base", "merged"):
        if (precision := getattr(config.weights, name)) in ("int8", "nf4") and missing_packages("gpu"):
            raise _refusal("gpu", f"weights.{name}={precision}")
    if missing_packages("train") and not may_be_stored():
        raise _refusal("train", "Training and sampling")


def check_stages(config: Pipeline, profile: str, *, rounds: bool = False) -> None:
    """Refuse a run that would build a stage whose packages are not installed here. Raises InputError."""
    absent = {*missing_packages("train")}
    if not absent or config.pools.gpu:
        return
    from flows.commands.plan import plan, plan_rounds

    planned = plan_rounds(config, profile)[0] if rounds else plan(config, profile)
    stages = [
        one.stage
        for one in planned
        if one.action != "reuse" and absent & code_version.imported_packages(one.stage)
    ]
    if stages:
        raise _refusal("train", f"To build {', '.join(stages)}")


def may_be_stored() -> bool:
    """Return whether a run may find all its stages stored."""
    return (home() / "objects").exists() or os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http")


def check_servers() -> None:
    """Refuse `alignflow up` where its servers could not start. Raises InputError."""
    if missing_packages("server"):
        raise _refusal("server", "alignflow up")
    if os.environ.get("ALIGNFLOW_DATABASE") and find_spec("psycopg2") is None:
        raise InputError(
            "ALIGNFLOW_DATABASE needs psycopg2, which is not installed: pip install 'alignflow[server]'"
        )


def check_training(what: str) -> None:
    """Refuse a command that loads a model where that is not possible. Raises InputError."""
    if missing_packages("train"):
        raise _refusal("train", what)


def check_serving() -> None:
    """Refuse `alignflow serve` where its server could not start. Raises InputError."""
    check_training("alignflow serve")
    if missing_packages("serve"):
        raise _refusal("serve", "alignflow serve")


def _refusal(extra: str, what: str) -> InputError:
    return InputError(
        f"{what}: {', '.join(missing_packages(extra))} must be installed here: pip install "
        f"'alignflow[{extra}]'"
    )
