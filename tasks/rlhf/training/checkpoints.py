"""Write and read checkpoints of a training loop atomically.

Random numbers are functions of (seed, step) and need no state.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from tasks.rlhf.compute.fsdp import shard_like
from tasks.system.files import sync_path

STATE, TENSORS, BEST = "state.json", "tensors.safetensors", "best.safetensors"


class Record(NamedTuple):
    """A checkpoint's folder and the state of its training loop that is no tensor."""

    folder: Path
    step: int  # optimizer steps (PPO: rollout batches) done
    state: dict[str, Any]


class Checkpoint(NamedTuple):
    """The state of a training loop."""

    step: int  # optimizer steps (PPO: rollout batches) done
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any] | None = None,
    *,
    best: Mapping[str, Tensor] | None = None,
) -> None:
    """Write checkpoint ``step``: temporary folder, fsync, rename; then delete older ones.

    ``best`` are weights that every later checkpoint keeps as well, until others are given.
    """
    temporary = begin(folder, step)
    _write(tensors, temporary / TENSORS)
    if best is not None:
        _write(best, temporary / BEST)
    commit(folder, step, state or {}, keep_best=best is None)


def temporary_folder(folder: Path, step: int) -> Path:
    """Return the folder in which checkpoint ``step`` is written."""
    return folder / f"new-{step:08d}"


def begin(folder: Path, step: int) -> Path:
    """Return an empty `temporary_folder`."""
    temporary = temporary_folder(folder, step)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    return temporary


def commit(folder: Path, step: int, state: dict[str, Any], *, keep_best: bool) -> None:
    """Make the files in the `temporary_folder` the newest checkpoint, with the best weights of the one before
    if they are to be kept.
    """
    target, temporary = folder / f"step-{step:08d}", temporary_folder(folder, step)
    before = newest(folder)
    if keep_best and before is not None:
        for kept in before.folder.glob("best*"):
            _link(kept, temporary / kept.name)
    (temporary / STATE).write_text(json.dumps({"step": step, "state": state}))
    for path in (*temporary.rglob("*"), temporary):
        sync_path(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    sync_path(folder)
    _delete_others(folder, target)


def _link(source: Path, target: Path) -> None:
    """Link a file, or a folder of files."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=os.link)
    else:
        os.link(source, target)


def _delete_others(folder: Path, kept: Path) -> None:
    """Delete all checkpoints but one; renamed first, so that no process copies a part of one."""
    for path in folder.glob("step-*"):
        if path != kept:
            os.rename(path, path.with_name(f"old-{path.name}"))
    for path in folder.glob("old-*"):
        shutil.rmtree(path)


def newest(folder: Path) -> Record | None:
    """Return the newest complete checkpoint without its tensors, or None if there is none."""
    path = max(folder.glob("step-*"), default=None)
    if path is None or not (path / STATE).exists():
        return None
    return Record(path, **json.loads((path / STATE).read_text()))


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None if there is none."""
    found = newest(folder)
    return None if found is None else Checkpoint(found.step, load_tensors(found.folder), found.state)


def load_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Return the tensors in the folder of a checkpoint."""
    return load_file(checkpoint / TENSORS)


def best(folder: Path) -> dict[str, Tensor]:
    """Return the weights that the newest checkpoint keeps as the best."""
    found = newest(folder)
    assert found is not None, folder
    return load_file(found.folder / BEST)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, path)


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Return parameters and their optimizer moments, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.data
        tensors |= {
            f"optimizer.{key}.{name}": value
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
    return tensors


def restore_training(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Load what ``training_tensors`` returned."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(tensors[f"parameter.{name}"], parameter))
    for key, value in tensors.items():
        if (found := moment_of(key, parameters)) is not None:
            name, moment = found
            parameter = parameters[name]
            restored = value.to(parameter.device) if moment == "step" else shard_like(value, parameter)
            optimizer.state[parameter][moment] = restored.clone()


def moment_of(key: str, parameters: Mapping[str, nn.Parameter]) -> tuple[str, str] | None:
    """Return the parameter and the name of its moment that a key of a checkpoint stands for, if any."""
    if not key.startswith("optimizer."):
        return None
    moment, name = key.removeprefix("optimizer.").split(".", 1)  # moments have no dots
    return (name, moment) if name in parameters else None
