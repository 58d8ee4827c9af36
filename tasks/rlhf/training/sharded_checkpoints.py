"""Write and read checkpoints of weights that are split over the ranks: each rank its own part.

torch's distributed checkpoint writes them as safetensors, a file for each rank, with the place of each part
in its tensor. Any number of ranks reads them, and the file that `checkpoints.save` writes too.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tasks.rlhf.compute import distributed
from tasks.rlhf.training import checkpoints

TENSORS, BEST = "tensors", "best"  # folders of a checkpoint


def is_sharded(parameters: Mapping[str, nn.Parameter]) -> bool:
    """Return whether a rank holds only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: dict[str, Any],
    *,
    best: Mapping[str, Tensor] | None,
) -> None:
    """Write checkpoint ``step`` as `checkpoints.save` does; all ranks call it."""
    temporary = checkpoints.temporary_folder(folder, step)
    if distributed.is_first():
        checkpoints.begin(folder, step)
    distributed.barrier()
    _write(tensors, temporary / TENSORS)
    if best is not None:
        _write(best, temporary / BEST)
    if distributed.is_first():
        checkpoints.commit(folder, step, state, keep_best=best is None)


def _write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    # imported here: it takes a second, and only sharded weights need it
    import torch.distributed.checkpoint as dcp

    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        dcp.save(detached, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except dcp.CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):  # a full disk, which is told as one
                raise cause from error
        raise


def restore_training(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer, checkpoint: Path) -> None:
    """Load what `checkpoints.training_tensors` returned from the folder of a checkpoint, sharded or not."""
    if not (is_sharded(parameters) or (checkpoint / TENSORS).is_dir()):
        checkpoints.restore_training(parameters, optimizer, checkpoints.load_tensors(checkpoint))
        return
    place = _place(checkpoint, TENSORS)
    wanted = {f"parameter.{name}": parameter.data for name, parameter in parameters.items()}
    for key in _names(place):
        found = checkpoints.moment_of(key, parameters)
        if found is None:
            continue
        name, moment = found
        like = parameters[name].data
        tensor = torch.zeros((), device=like.device) if moment == "step" else torch.zeros_like(like)
        optimizer.state[parameters[name]][moment] = wanted[key] = tensor
    _read(wanted, place)


@torch.no_grad()
def restore_best(parameters: Mapping[str, nn.Parameter], folder: Path) -> None:
    """Load the weights that the newest checkpoint in ``folder`` keeps as the best."""
    checkpoint = checkpoints.newest(folder)
    assert checkpoint is not None, folder
    if is_sharded(parameters) or (checkpoint.folder / BEST).is_dir():
        into = {name: parameter.data for name, parameter in parameters.items()}
        _read(into, _place(checkpoint.folder, BEST))
        return
    for name, tensor in checkpoints.best(folder).items():
        parameters[name].copy_(tensor)


def _place(checkpoint: Path, name: str) -> Path:
    """Return the folder with the files of ``name``: that of the checkpoint, if they are not sharded."""
    return checkpoint / name if (checkpoint / name).is_dir() else checkpoint


def _names(place: Path) -> list[str]:
    import torch.distributed.checkpoint as dcp

    return list(dcp.HuggingFaceStorageReader(str(place)).read_metadata().state_dict_metadata)


@torch.no_grad()
def _read(into: dict[str, Tensor], place: Path) -> None:
    """Read tensors by name into those of ``into``, each rank its own part."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(into, storage_reader=dcp.HuggingFaceStorageReader(str(place)))
