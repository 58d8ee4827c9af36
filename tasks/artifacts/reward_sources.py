"""Find the reward models and functions that the user has PPO score answers with.

A model folder is an input of the stage. A function is imported by the program wherever that runs; here its
source is only read, and its digest is a part of the key.
"""

import difflib
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.artifacts.base_model import check_model_folder
from tasks.config.sections.rewards import OtherRewardModel, RewardFunction, Rewards
from tasks.system.errors import InputError
from tasks.system.module_sources import defined_names, find_module, source_digest

RECORD = "reward.json"  # in the artifact of a stage reward


def reward_models(rewards: Rewards) -> dict[str, Artifact]:
    """Return the folders of ppo.rewards.models as the inputs reward_NAME and base_NAME. Raises InputError."""
    found: dict[str, Artifact] = {}
    for model in rewards.models:
        setting = f"ppo.rewards.models {model.name}"
        folder = Path(model.path).expanduser()
        if not folder.is_dir():
            raise InputError(f"{setting}: there is no folder {folder}")
        if (folder / RECORD).is_file():
            _check_artifact(folder, model, setting)
        else:
            check_model_folder(folder, setting=setting)
        found[f"reward_{model.name}"] = user_artifact(folder)
        if model.base:
            base = Path(model.base).expanduser()
            if not base.is_dir():
                raise InputError(f"{setting}: there is no folder {base}, which base names")
            check_model_folder(base, setting=f"{setting}, base")
            found[f"base_{model.name}"] = user_artifact(base)
    return found


def _check_artifact(folder: Path, model: OtherRewardModel, setting: str) -> None:
    is_adapter = (folder / "adapter").is_dir()
    if not is_adapter and not (folder / "model").is_dir():
        raise InputError(f"{setting}: {folder} has {RECORD} and neither adapter/ nor model/ beside it")
    if model.base and not is_adapter:
        raise InputError(f"{setting}: {folder} has weights of its own and needs no base: leave base out")


def function_digests(rewards: Rewards) -> dict[str, str]:
    """Return the digest of each function's source by its name. Raises InputError.

    It covers the module's file, the packages that it lies in, and what it imports from beside it.
    """
    return {function.name: _function_digest(function) for function in rewards.functions}


def _function_digest(function: RewardFunction) -> str:
    setting = f"ppo.rewards.functions {function.name}"
    module, _, name = function.function.partition(":")
    path = find_module(module)
    if path is None:
        raise InputError(
            f"{setting}: there is no module {module} that can be imported: install it, or put the folder "
            "that holds it on PYTHONPATH, here and wherever the stage runs"
        )
    try:
        known = defined_names(path)
        digest = source_digest(module)
    except SyntaxError as error:
        place = Path(error.filename or path).name
        raise InputError(f"{setting}: {place} is no Python, line {error.lineno}: {error.msg}") from None
    if known is not None and name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        proposal = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{setting}: {path.name} has no function {name}{proposal}")
    return digest
