"""Choose what of a base is trained (a LoRA adapter, bottlenecks, every weight), and load what was trained."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import bottleneck, loading, lora
from tasks.rlhf.models.fingerprint import Fingerprint, check_fingerprint, save_fingerprint
from tasks.system.errors import InputError

HEAD = "score.safetensors"  # beside model/, if all weights of a reward model were trained

Active = Callable[[], AbstractContextManager[PreTrainedModel]]


def unchanged(model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
    """Yield the model unchanged."""
    return nullcontext(model)


class Save(Protocol):
    """A function that writes what was trained into an artifact's folder. All ranks call it.

    ``number`` is the member of an ensemble, ``score`` (1, D) a reward model's head.
    """

    def __call__(self, artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None: ...


class Trainable(NamedTuple):
    """A model, the parameters of it that are trained, and how to compute with them and save them."""

    parameters: dict[str, nn.Parameter]
    active: Active  # returns a context in which the model computes with the parameters
    train: Callable[[], object]  # switches on the dropout of what is trained, and no other
    model: PreTrainedModel | PeftModel
    save: Save
    reference: Active | None  # the same for what the model computed before it was trained, if that is kept
    is_base_at_start: bool = True  # untrained, it computes what the base does
    clipped_separately: tuple[
        tuple[str, ...], ...
    ] = ()  # groups of parameters by name, each with its own norm


def attach_lora(
    base: PreTrainedModel | PeftModel,
    name: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str | tuple[str, ...],
    fingerprint: Fingerprint,
) -> Trainable:
    """Attach a fresh low-rank adapter called ``name`` (torch's global seed), saved as adapter/."""
    config = lora.build_config(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    model = lora.attach(base, name, config)

    def save(artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None:
        if not distributed.is_first():
            return
        lora.save(model, name, adapter_folder(artifact, number), base=fingerprint, score=score)

    return Trainable(
        parameters=lora.parameters(model, name),
        active=partial(lora.active, model, name),
        train=partial(lora.train_mode, model),
        model=model,
        save=save,
        reference=partial(lora.active, model, None),
    )


def adapter_folder(artifact: Path, number: int) -> Path:
    """Return the folder of member ``number`` of an ensemble: adapter/, adapter-1/, ..."""
    return artifact / (f"adapter-{number}" if number else "adapter")


def shard_trained(base: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Spread a base over the ranks to train all of its weights, in fp32 as `unfreeze_all` does."""
    fsdp.shard(base.requires_grad_(True), device, compute_dtype=base.dtype)
    return base


def unfreeze_all(base: PreTrainedModel, tokenizer_of: Path) -> Trainable:
    """Unfreeze every weight, in fp32 with matrix products in the dtype that the weights had.

    Saved as model/ with the tokenizer of the folder ``tokenizer_of``. Each rank keeps a part of every weight
    if `shard_trained` has spread them.
    """
    compute_dtype = fsdp.compute_dtype(base)
    if not isinstance(base, FSDPModule):
        nn.Module.float(base).requires_grad_(True)

    @contextmanager
    def active() -> Iterator[PreTrainedModel]:
        with torch.autocast(base.device.type, compute_dtype, enabled=compute_dtype != torch.float32):
            yield base

    def save(artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None:
        assert number == 0
        stored = base.state_dict()
        buffers = {name: buffer for name, buffer in base.named_buffers() if name in stored}
        weights = fsdp.gather_full({**dict(base.named_parameters()), **buffers})  # a tied tensor once
        if not distributed.is_first():
            return
        if score is not None:
            save_file({"score.weight": score.detach().cpu().clone().contiguous()}, artifact / HEAD)
        base.save_pretrained(artifact / "model", state_dict=weights)
        loading.load_tokenizer(tokenizer_of).save_pretrained(artifact / "model")

    return Trainable(
        parameters=dict(base.named_parameters()),
        active=active,
        train=base.eval,
        model=base,
        save=save,
        reference=None,
    )


def attach_bottlenecks(
    base: PreTrainedModel,
    *,
    form: bottleneck.Form,
    width: int | None,
    whole_layers: bool,
    fingerprint: Fingerprint,
) -> Trainable:
    """Attach fresh bottlenecks to every MLP (torch's global seed), saved as bottleneck/.

    Without ``width`` at most half of the base's parameters are trained.
    """
    width = width or bottleneck.halving_width(base, whole_layers=whole_layers)
    bottleneck.attach(base, width=width, form=form, whole_layers=whole_layers)

    def save(artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None:
        assert number == 0
        assert score is None
        if not distributed.is_first():
            return
        bottleneck.save(base, artifact / "bottleneck", base=fingerprint.weights)
        save_fingerprint(fingerprint, artifact / "bottleneck")

    return Trainable(
        parameters=bottleneck.parameters(base),
        active=partial(unchanged, base),
        train=base.eval,
        model=base,
        save=save,
        reference=None if whole_layers else partial(bottleneck.active, base, enabled=False),
        is_base_at_start=form == "parallel",
    )


def load(
    artifact: Path,
    base: PreTrainedModel | PeftModel,
    name: str,
    *,
    actual: Fingerprint,
    setting: str,
    reload_base: Callable[[], PreTrainedModel],
) -> tuple[PreTrainedModel | PeftModel, Active]:
    """Load the trained policy of an artifact; return the base, and a context in which the policy computes.

    ``actual`` is the fingerprint of ``base``. An adapter shares the base; bottlenecks need a base of their
    own, from ``reload_base``. Raises InputError if the policy was trained on another base.
    """
    if (artifact / "adapter").is_dir():
        check_fingerprint(artifact / "adapter", actual, setting=setting)
        base, _ = lora.load(base, name, artifact / "adapter")
        return base, partial(lora.active, base, name)
    if (artifact / "bottleneck").is_dir():
        check_fingerprint(artifact / "bottleneck", actual, setting=setting)
        own = reload_base()
        bottleneck.load(own, artifact / "bottleneck")
    else:
        device = next(base.parameters()).device
        own = loading.load(artifact / "model", device=device)
    return base, partial(unchanged, own)


def load_start(parameters: dict[str, nn.Parameter], place: Path) -> None:
    """Copy weights by name from an artifact, one of its folders, or a safetensors file.

    Raises InputError if they do not fit.
    """
    files = [place] if place.is_file() else _weight_files(place)
    found: dict[str, Tensor] = {}
    for path in files:
        found |= {_file_name(name): tensor for name, tensor in load_file(path).items()}
    wanted = {_file_name(name): parameter for name, parameter in parameters.items()}
    missing = [name for name, p in wanted.items() if name not in found or found[name].shape != p.shape]
    if missing:
        raise InputError(
            f"{place} does not hold the weights to start from: {len(missing)} of {len(wanted)} are missing "
            f"or of another shape, first {missing[0]}."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(fsdp.shard_like(found[name].to(parameter.dtype), parameter))


def _weight_files(place: Path) -> list[Path]:
    """Return the safetensors files of an artifact, or of one of its folders."""
    folders = [place / name for name in ("adapter", "bottleneck", "model")]
    parts = [folder for folder in folders if folder.is_dir()] or [place]
    return sorted(path for folder in (*parts, place) for path in folder.glob("*.safetensors"))


def _file_name(name: str) -> str:
    """Return a parameter's name as in files: without the adapter's name, which peft adds in memory."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "lora_A" in parts or "lora_B" in parts:
        place = next(i for i, part in enumerate(parts) if part in ("lora_A", "lora_B"))
        parts = [*parts[: place + 1], "weight"]
    return re.sub(r"^score\d+\.", "score.", ".".join(parts))  # an ensemble's heads
