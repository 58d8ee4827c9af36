"""A base and what of it is trained: an adapter, a bottleneck, or every weight."""

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
from transformers import PreTrainedModel

from tasks.rlhf.compute import distributed, fsdp
from tasks.rlhf.models import bottleneck as bottlenecks
from tasks.rlhf.models import fingerprint, loading
from tasks.rlhf.models import fingerprint as models_fingerprint
from tasks.rlhf.models import lora as models_lora
from tasks.rlhf.models.fingerprint import Fingerprint
from tasks.system.errors import InputError

HEAD = "score.safetensors"  # of a reward model that is a model of its own, beside its model/


Active = Callable[[], AbstractContextManager[PreTrainedModel]]


def unchanged(model: PreTrainedModel) -> AbstractContextManager[PreTrainedModel]:
    """A model that is had without more ado."""
    return nullcontext(model)


class Save(Protocol):
    """Writes what was trained into an artifact's folder; a reward model's with its score head (1, D), an ensemble's by number. All ranks call it."""

    def __call__(self, artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None: ...


class Trainable(NamedTuple):
    parameters: dict[str, nn.Parameter]  # what is trained
    active: Active  # the model computing with them
    train: Callable[[], object]  # switches on the dropout of what is trained, and no other
    model: PreTrainedModel | PeftModel
    save: Save
    is_base_at_start: bool = True  # untrained, it computes what the base does
    apart: tuple[
        tuple[str, ...], ...
    ] = ()  # names of parameters whose gradients are clipped apart from the others'


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
    """A fresh low-rank adapter called ``name`` (torch's global seed), to be saved as adapter/."""
    model = models_lora.attach(
        base, name, models_lora.build_config(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    )

    def save(artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None:
        if not distributed.is_first():
            return
        models_lora.save(model, name, adapter_folder(artifact, number), base=fingerprint, score=score)

    return Trainable(
        models_lora.parameters(model, name),
        partial(models_lora.active, model, name),
        partial(models_lora.train_mode, model),
        model,
        save,
    )


def adapter_folder(artifact: Path, number: int) -> Path:
    """Where member ``number`` of an ensemble lies: adapter/, adapter-1/, ..."""
    return artifact / (f"adapter-{number}" if number else "adapter")


def unfreeze_all(base: PreTrainedModel, tokenizer_of: Path, *, shard: bool = False) -> Trainable:
    """Every weight, in fp32 with matrix products in the precision that they came in; saved as model/ with the tokenizer of that folder.

    With ``shard`` each of several ranks keeps a part of every weight.
    """
    computes = base.dtype
    nn.Module.float(base).requires_grad_(True)
    if shard and distributed.world() > 1:
        fsdp.shard(base)

    @contextmanager
    def active() -> Iterator[PreTrainedModel]:
        with torch.autocast(base.device.type, computes, enabled=computes != torch.float32):
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

    return Trainable(dict(base.named_parameters()), active, base.eval, base, save)


def attach_bottlenecks(
    base: PreTrainedModel,
    *,
    form: bottlenecks.Form,
    width: int | None,
    whole_layers: bool,
    fingerprint: Fingerprint,
) -> Trainable:
    """Fresh bottlenecks in place of every MLP or beside it (torch's global seed), saved as bottleneck/."""
    bottlenecks.attach(
        base,
        width=width or bottlenecks.halving_width(base, whole_layers=whole_layers),
        form=form,
        whole_layers=whole_layers,
    )

    def save(artifact: Path, *, number: int = 0, score: Tensor | None = None) -> None:
        assert number == 0
        assert score is None
        if not distributed.is_first():
            return
        bottlenecks.save(base, artifact / "bottleneck", base=fingerprint.weights)
        models_fingerprint.save_fingerprint(fingerprint, artifact / "bottleneck")

    return Trainable(
        bottlenecks.parameters(base),
        partial(unchanged, base),
        base.eval,
        base,
        save,
        is_base_at_start=form == "parallel",
    )


def load(
    artifact: Path,
    base: PreTrainedModel | PeftModel,
    name: str,
    *,
    actual: Fingerprint,
    setting: str,
    again: Callable[[], PreTrainedModel],
) -> tuple[PreTrainedModel | PeftModel, Active]:
    """``base``, whose fingerprint is ``actual``, with the trained policy of an artifact, and how to have the policy; an adapter shares the base,
    bottlenecks get one of their own from ``again``. Raises InputError where the policy belongs to another base."""
    if (artifact / "adapter").is_dir():
        fingerprint.check_fingerprint(artifact / "adapter", actual, setting=setting)
        base, _ = models_lora.load(base, name, artifact / "adapter")
        return base, partial(models_lora.active, base, name)
    if (artifact / "bottleneck").is_dir():
        fingerprint.check_fingerprint(artifact / "bottleneck", actual, setting=setting)
        own = again()
        bottlenecks.load(own, artifact / "bottleneck")
    else:
        device = next(base.parameters()).device
        own = loading.load(artifact / "model", device=device)
    return base, partial(unchanged, own)


def load_start(parameters: dict[str, nn.Parameter], place: Path) -> None:
    """Begin with the weights of an artifact's folder or of a file in safetensors format, by name. Raises InputError where they do not fit."""
    folders = [place / name for name in ("adapter", "bottleneck", "model") if (place / name).is_dir()] or [
        place
    ]  # an artifact's, or one of these
    files = (
        [place]
        if place.is_file()
        else sorted(path for folder in (*folders, place) for path in folder.glob("*.safetensors"))
    )
    found: dict[str, Tensor] = {}
    for path in files:
        found |= {_file_name(name): tensor for name, tensor in load_file(path).items()}
    wanted = {_file_name(name): parameter for name, parameter in parameters.items()}
    missing = [name for name, p in wanted.items() if name not in found or found[name].shape != p.shape]
    if missing:
        raise InputError(
            f"{place} does not hold the weights to start from: {len(missing)} of {len(wanted)} are missing or of another shape, first {missing[0]}."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(fsdp.shard_like(found[name].to(parameter.dtype), parameter))


def _file_name(name: str) -> str:
    """A parameter's name without what peft puts around it in memory (an adapter's own name) and not in files."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "lora_A" in parts or "lora_B" in parts:
        place = next(i for i, part in enumerate(parts) if part in ("lora_A", "lora_B"))
        parts = [*parts[: place + 1], "weight"]
    return re.sub(r"^score\d+\.", "score.", ".".join(parts))  # an ensemble's heads
