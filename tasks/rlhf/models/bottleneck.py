"""Attach bottleneck adapters: two narrow linear layers that replace every MLP, or run parallel to it.

Houlsby et al. 2019; the parallel form is He et al. 2022.

    b(x) = W_up gelu(W_down x + b_down) + b_up              W_down (W, D), W_up (D, W), gelu with erf

``replace``: MLP(x) becomes b(x). ``parallel``: it becomes MLP(x) + b(x). The MLP stays in memory, frozen:
with bottlenecks disabled the model is its own reference.

New parameters are fp32 whatever the base is, and so is b(x) until it is cast to x's dtype. At the start
(torch's global seed) W_down is N(0, 1 / D) and biases are 0. W_up of ``parallel`` is 0, so nothing changes;
of ``replace`` it is N(0, 1 / (2 L W)): then the sum of the 2 L outputs of L layers keeps its scale (GPT-2,
Radford et al. 2019).

Which width trains half of GPT-2 small? It has 124 439 808 parameters (D = 768, L = 12; a bottleneck has
W (2 D + 1) + D, all MLPs 56 669 184); half is 62 219 904.
- Bottlenecks alone reach it at W = 3372, above the MLP's own 3072: any narrower one trains less than half.
- All weights, with bottlenecks for MLPs, never get below the other 67 770 624 (54 %).
- ``whole_layers``, that is bottlenecks and their layers' attention and norms (28 385 280) but no embeddings,
  reaches it at W = 1833: 62 202 348.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.system.errors import InputError

Form = Literal["replace", "parallel"]
ACTIVATION = "gelu"
WEIGHTS, CONFIG = "bottleneck.safetensors", "bottleneck.json"


class Bottleneck(nn.Module):
    """Module that replaces one layer's MLP, (B, T, D) to (B, T, D); ``original`` is that MLP."""

    def __init__(
        self,
        original: nn.Module,
        *,
        hidden_size: int,
        width: int,
        form: Form,
        whole_layer: bool,
        num_layers: int,
    ) -> None:
        super().__init__()
        assert width > 0, width
        assert form in get_args(Form), form
        device = next(original.parameters()).device
        self.original = original
        self.down = nn.Linear(hidden_size, width, device=device, dtype=torch.float32)
        self.up = nn.Linear(width, hidden_size, device=device, dtype=torch.float32)
        self.form, self.whole_layer, self.enabled = form, whole_layer, True
        nn.init.normal_(self.down.weight, std=hidden_size**-0.5)
        nn.init.zeros_(self.down.bias)
        if form == "parallel":
            nn.init.zeros_(self.up.weight)
        else:
            nn.init.normal_(self.up.weight, std=(2 * num_layers * width) ** -0.5)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return b(x), MLP(x) + b(x), or MLP(x) if disabled; x (B, T, D)."""
        if self.enabled and self.form == "replace":
            return self.bottleneck(x)
        output: Tensor = self.original(x)
        return output + self.bottleneck(x) if self.enabled else output

    def bottleneck(self, x: Tensor) -> Tensor:
        """Return b(x); x (B, T, D)."""
        output: Tensor = self.up(functional.gelu(self.down(x.float())))
        return output.to(x.dtype)


def attach(model: PreTrainedModel, *, width: int, form: Form, whole_layers: bool = False) -> None:
    """Give every layer of ``model`` a fresh bottleneck (torch's global seed), frozen and in eval mode.

    With ``whole_layers`` `parameters` includes attention and norms. The model has only one copy of these, so
    it is no longer its own reference: compute the reference first. Raises InputError if the base cannot be
    trained like that.
    """
    layers = _layers(model)
    assert not _attached(model), "this model has bottlenecks already"
    dtypes = {str(p.dtype) for layer in layers for p in layer.parameters()} - {"torch.float32"}
    if whole_layers and dtypes:
        raise InputError(
            f"Whole layers cannot be trained in {min(dtypes)}, which rounds small updates away: train the "
            "bottlenecks only, or give an fp32 base."
        )
    sizes = {"hidden_size": _hidden_size(model), "width": width, "num_layers": len(layers)}
    for layer in layers:
        layer.mlp = Bottleneck(layer.mlp, form=form, whole_layer=whole_layers, **sizes)  # type: ignore[arg-type]
    model.requires_grad_(False)
    model.eval()


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers: every module with an ``mlp``."""
    layers = [module for module in model.modules() if isinstance(getattr(module, "mlp", None), nn.Module)]
    if not layers:
        raise InputError(
            f"{model.config.model_type} models have no module named mlp in their layers, which bottlenecks "
            "would replace: train a LoRA adapter."
        )
    return layers


def _attached(model: PreTrainedModel) -> dict[str, Bottleneck]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Bottleneck)}


def _hidden_size(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().hidden_size)


def halving_width(model: PreTrainedModel, *, whole_layers: bool = False) -> int:
    """Return the greatest width that trains at most half of the bare ``model``'s parameters."""
    layers, hidden_size = _layers(model), _hidden_size(model)
    assert not _attached(model), "half is counted from the bare model's parameters"
    half = sum(p.numel() for p in model.parameters()) // 2
    others = 0
    for layer in layers if whole_layers else []:
        others += sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("mlp."))
    width = ((half - others) // len(layers) - hidden_size) // (2 * hidden_size + 1)
    if width < 1:
        raise InputError(
            f"Even bottlenecks of width 1 train more than half of this {model.config.model_type} model: "
            "leave its layers' other weights frozen."
        )
    return width


def parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Unfreeze and return by name the bottlenecks, with ``whole_layers`` also attention and norms."""
    chosen = _chosen(model)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def _chosen(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    attached = _attached(model)
    assert attached, "this model has no bottlenecks"
    prefixes = []
    for name, module in attached.items():
        prefixes.append(name.removesuffix("mlp") if module.whole_layer else f"{name}.")
    frozen = tuple(f"{name}.original." for name in attached)
    chosen = {}
    for key, parameter in model.named_parameters():
        if key.startswith(tuple(prefixes)) and not key.startswith(frozen):
            chosen[key] = parameter
    return chosen


@contextmanager
def active(model: PreTrainedModel, enabled: bool) -> Iterator[PreTrainedModel]:
    """Yield ``model`` computing with its bottlenecks, or as the base, bit for bit; blocks may nest."""
    attached = list(_attached(model).values())
    assert attached, "this model has no bottlenecks"
    assert enabled or not any(module.whole_layer for module in attached), (
        "whole layers are trained: the base is gone"
    )
    before = [module.enabled for module in attached]
    for module in attached:
        module.enabled = enabled
    try:
        yield model
    finally:
        for module, was_enabled in zip(attached, before, strict=True):
            module.enabled = was_enabled


def save(model: PreTrainedModel, folder: Path, *, base: str) -> None:
    """Write the trained parameters and their form; ``base`` is the digest of the base's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: p.detach().cpu().contiguous() for key, p in _chosen(model).items()}
    first = next(iter(_attached(model).values()))
    record = {
        "form": first.form,
        "width": first.down.out_features,
        "whole_layers": first.whole_layer,
        "activation": ACTIVATION,
        "base": base,
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def load(model: PreTrainedModel, folder: Path) -> None:
    """Attach the bottlenecks of ``folder`` to ``model``, frozen.

    Raises InputError if a tensor is missing or does not fit.
    """
    record = _record(folder)
    weights = load_file(folder / WEIGHTS)
    attach(model, width=record["width"], form=record["form"], whole_layers=record["whole_layers"])
    chosen = _chosen(model)
    wrong = set(chosen) ^ set(weights)
    for key in set(chosen) & set(weights):
        if (chosen[key].shape, chosen[key].dtype) != (weights[key].shape, weights[key].dtype):
            wrong.add(key)
    if wrong:
        raise InputError(
            f"The bottlenecks of {folder} do not fit this base: {len(wrong)} tensors are missing, unknown or "
            "of another shape or type."
        )
    with torch.no_grad():
        for key, parameter in chosen.items():
            parameter.copy_(weights[key])


def _record(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} holds no bottlenecks: {CONFIG} and {WEIGHTS} are expected.")
    record: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if record["activation"] != ACTIVATION or record["form"] not in get_args(Form):
        raise InputError(
            f"{folder / CONFIG} says form {record['form']} and activation {record['activation']}: these "
            "bottlenecks are not supported."
        )
    return record
