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

BEST = "best.safetensors"


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
    target, temporary = folder / f"step-{step:08d}", folder / f"new-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _write(tensors, temporary / "tensors.safetensors")
    if best is not None:
        _write(best, temporary / BEST)
    elif (kept := _newest(folder, BEST)) is not None:
        os.link(kept, temporary / BEST)
    (temporary / "state.json").write_text(json.dumps({"step": step, "state": state or {}}))
    for path in (*temporary.iterdir(), temporary):
        sync_path(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    sync_path(folder)
    _delete_others(folder, target)


def _delete_others(folder: Path, kept: Path) -> None:
    """Delete all checkpoints but one; renamed first, so that no process copies a part of one."""
    for path in folder.glob("step-*"):
        if path != kept:
            os.rename(path, path.with_name(f"old-{path.name}"))
    for path in folder.glob("old-*"):
        shutil.rmtree(path)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, or None if there is none."""
    path = _newest(folder, "state.json")
    if path is None:
        return None
    record = json.loads(path.read_text())
    return Checkpoint(record["step"], load_file(path.with_name("tensors.safetensors")), record["state"])


def best(folder: Path) -> dict[str, Tensor]:
    """Return the weights that the newest checkpoint keeps as the best."""
    path = _newest(folder, BEST)
    assert path is not None, folder
    return load_file(path)


def _newest(folder: Path, name: str) -> Path | None:
    """Return the path of a file of the newest complete checkpoint."""
    path = max(folder.glob("step-*"), default=None)
    return path / name if path is not None and (path / name).exists() else None


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
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(shard_like(tensors[f"parameter.{name}"], parameter))
        marker = f".{name}"
        for key, value in tensors.items():
            if not (key.startswith("optimizer.") and key.endswith(marker)):
                continue
            moment = key[len("optimizer.") : -len(marker)]
            if "." in moment:  # of another parameter, whose name ends in this one's
                continue
            restored = value.to(parameter.device) if moment == "step" else shard_like(value, parameter)
            optimizer.state[parameter][moment] = restored.clone()
