"""Test checkpoints of weights that are split over ranks: any number of ranks goes on from them, exactly."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.rlhf.models import trainable
from tasks.rlhf.training import checkpoints, sharded_checkpoints
from tasks.rlhf.training.loop import Schedule, Training
from tests.programs.ranks.test_distributed import start
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with torchrun's agent"),
]
SCHEDULE = Schedule(
    total=9,
    seed=0,
    peak=1e-2,
    shape="constant",
    warmup_share=0.0,
    evaluations=1,
    patience=None,
    keep_best=True,
)


def started(folder: Path, *, shard: bool) -> Training:
    """Return a training of a model with matrices in bfloat16, whose norms stay whole if it is sharded."""
    model = tiny.model("qwen2").bfloat16()
    if shard:
        trainable.shard_trained(model, tiny.CPU)
    tuned = trainable.unfreeze_all(model, Path())
    return Training(tuned.parameters, folder, SCHEDULE, weight_decay=0.1)


RANKS = """
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.training import checkpoints
from tests.programs.ranks.test_sharded_checkpoints import started

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
with distributed.process_group():
    training = started(folder / "checkpoints", shard=True)
    parameters = training.parameters
    assert any(isinstance(p, DTensor) for p in parameters.values())
    assert not all(isinstance(p, DTensor) for p in parameters.values())
    for step in range(training.start, training.start + steps):
        for number, p in enumerate(parameters.values()):
            p.grad = p.detach() * (step + 1) / (number + 1)
        training.optimizer.step()
        if step == 0:
            training.record_evaluation(1, 0.5)
        training.save(step + 1, every=1)
    found = fsdp.gather_full(checkpoints.training_tensors(parameters, training.optimizer))
    found = {name: tensor.clone() for name, tensor in found.items()}
    training.restore_best()
    best = fsdp.gather_full({f"best.{name}": p for name, p in parameters.items()})
    if distributed.is_first():
        tensors = {name: tensor.detach() for name, tensor in (found | best).items()}
        save_file(tensors, folder / f"found-{distributed.world()}-{steps}.safetensors")
os._exit(0)  # as programs do
"""


def by_ranks(folder: Path, *, ranks: int, steps: int) -> dict[str, torch.Tensor]:
    """Take ``steps`` steps from the newest checkpoint by several ranks; return weights and moments after it,
    and the best weights.
    """
    (folder / "ranks.py").write_text(RANKS)
    agent = start(folder, str(folder / "ranks.py"), str(folder), str(steps), ranks=ranks)
    assert agent.wait(900) == 0, (folder / "log.txt").read_text()[-4000:]
    return load_file(folder / f"found-{ranks}-{steps}.safetensors")


def here(folder: Path) -> tuple[Training, dict[str, torch.Tensor]]:
    """Return the training as one process goes on with it, and what `by_ranks` does."""
    training = started(folder / "checkpoints", shard=False)
    found = checkpoints.training_tensors(training.parameters, training.optimizer)
    found = {name: tensor.clone() for name, tensor in found.items()}
    return training, found


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == set()


def test_any_number_of_ranks_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    saved = by_ranks(tmp_path, ranks=2, steps=2)
    assert len([name for name in saved if name.startswith("optimizer.exp_avg.")]) > 9
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert newest.name == "step-00000002"
    files = sorted(str(path.relative_to(newest)) for path in newest.rglob("*.safetensors"))
    parts = [f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert files == [f"{kind}/{part}" for kind in ("best", "tensors") for part in parts]
    sizes = [(newest / file).stat().st_size for file in files]
    assert max(sizes[2:]) < 1.2 * min(sizes[2:])  # each rank writes its own half
    assert json.loads((newest / "state.json").read_text())["step"] == 2

    check_equal(by_ranks(tmp_path, ranks=3, steps=0), saved)
    training, found = here(tmp_path)
    check_equal(found, {name: tensor for name, tensor in saved.items() if not name.startswith("best.")})

    # One process goes on, and then several from its checkpoint; the best weights are those of step 1 still.
    training.save(3, every=1)
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert (newest / "tensors.safetensors").exists()
    assert not (newest / "tensors").exists()
    check_equal(by_ranks(tmp_path, ranks=2, steps=0), saved)
    training.restore_best()
    for name, parameter in training.parameters.items():
        assert torch.equal(parameter, saved[f"best.{name}"])
        if parameter.dim() > 1:  # biases are 0
            assert not torch.equal(parameter, saved[f"parameter.{name}"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_disk_that_refuses_a_part_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        sharded_checkpoints._write({"a": torch.zeros(1)}, tmp_path / "file" / "tensors")
