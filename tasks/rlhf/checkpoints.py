"""Everything a training loop needs to go on after a kill, written atomically. Random numbers are functions of (seed, step) and need no state."""

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


class Checkpoint(NamedTuple):
    step: int  # optimizer steps (PPO: rollout batches) done
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any] | None = None) -> None:
    """Write checkpoint ``step``: temporary folder, fsync, rename; older ones go after it stands."""
    target, temporary = folder / f"step-{step:08d}", folder / f"new-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "state": state or {}}))
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    _sync(folder)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; None where there is none."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        record = json.loads((path / "state.json").read_text())
        return Checkpoint(record["step"], load_file(path / "tensors.safetensors"), record["state"])
    return None


def training_tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Tensor]:
    """Parameters and their optimizer moments, by name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.data
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    return tensors


def restore_training(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``training_tensors`` took."""
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"parameter.{name}"])
        marker = f".{name}"
        for key, value in tensors.items():
            if key.startswith("optimizer.") and key.endswith(marker) and "." not in (short := key[len("optimizer.") : -len(marker)]):
                optimizer.state[parameter][short] = value.clone() if short == "step" else value.to(parameter.device).clone()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
