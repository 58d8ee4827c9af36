"""Attach several LoRA adapters to one frozen base: policy, critic and reward model share its weights.

With the adapters off it is the reference model.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional
from transformers import PreTrainedModel

from tasks.rlhf.models.fingerprint import Fingerprint, save_fingerprint
from tasks.rlhf.models.merged_linear import merged_linear
from tasks.system.errors import InputError

MERGE_UP_TO = 12  # elements of a weight over those of its adapter; on two cores merging is faster up to there
SMALL_WEIGHT = 1 << 18  # elements; larger weights are not copied, and their adapters cost them little
SCORE_KEY = "base_model.model.score.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def build_config(
    *, rank: int, alpha: float, dropout: float, targets: str | tuple[str, ...], task_type: str = "CAUSAL_LM"
) -> LoraConfig:
    """Return peft's configuration; ``targets`` is "all-linear" or module names."""
    chosen = targets if isinstance(targets, str) else list(targets)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides: a fraction is fine
        lora_dropout=dropout,
        target_modules=chosen,
        task_type=task_type,
        bias="none",
    )


def attach(model: PreTrainedModel | PeftModel, name: str, config: LoraConfig) -> PeftModel:
    """Attach a new adapter (torch's global seed) to ``model``, frozen and an exact no-op until trained.

    The base's weights are shared with the other adapters. Raises InputError if the targets match no module.
    """
    if config.target_modules == "all-linear":
        config.exclude_modules = _routers(model)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, adapter_name=name)
    except ValueError as error:
        raise InputError(
            f"lora.targets={config.target_modules} fits no module of this model: {str(error).splitlines()[0]}"
        ) from error
    _layers.pop(model, None)
    model.requires_grad_(False)
    return model.eval()


def _routers(model: nn.Module) -> list[str] | None:
    """Return names of linear layers that return more than their product (Llama 4's routers): not for peft."""
    found = []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Router") and isinstance(module, nn.Linear):
            found.append(name.removeprefix("base_model.model."))
    return found or None


def parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Unfreeze the adapter's parameters and return them by name."""
    chosen = {key: p for key, p in model.named_parameters() if f".{name}." in key and "lora_" in key}
    assert chosen, name
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


@contextmanager
def active(model: PeftModel, name: str | None) -> Iterator[PreTrainedModel]:
    """Yield the base model computing with adapter ``name``; None is the bare base, bit for bit.

    Weights must not change inside the block, and blocks do not nest.
    """
    layers = _adapted_layers(model)
    assert not any("forward" in vars(layer) for layer in layers if isinstance(layer, Linear)), (
        "a block of another adapter is open"
    )
    base = model.get_base_model()
    assert isinstance(base, PreTrainedModel)
    if name is None:
        with _disabled(layers):
            yield base
        return
    if model.active_adapters != [name]:
        _switch(model, layers, name)
    # sharded weights are whole only while their layer computes: nothing is added to them
    merged = nullcontext() if isinstance(base, FSDPModule) else _merged_weights(layers, name)
    with merged:
        yield base


_layers: WeakKeyDictionary[PeftModel, list[BaseTunerLayer]] = WeakKeyDictionary()


def _adapted_layers(model: PeftModel) -> list[BaseTunerLayer]:
    """Return the layers with adapters; a walk over a model of 32 layers takes as long as a small matrix."""
    if model not in _layers:
        _layers[model] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return _layers[model]


# peft's own switches also walk the model, and change what is trainable: 65 to 95 ms in 32 layers with three
# adapters, at every switch between policy and critic.
def _switch(model: PeftModel, layers: list[BaseTunerLayer], name: str) -> None:
    assert name in model.peft_config, name
    for layer in layers:
        layer._active_adapter = [name]
        assert layer.active_adapters == [name]
    tuner: Any = model.base_model
    model.active_adapter = tuner.active_adapter = name
    assert model.active_adapters == [name]


@contextmanager
def _disabled(layers: list[BaseTunerLayer]) -> Iterator[None]:
    for layer in layers:
        layer._disable_adapters = True
        assert layer.disable_adapters
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def _merged_weights(adapted: list[BaseTunerLayer], name: str) -> Iterator[None]:
    """Let small layers compute with W + s B A, built once per block: one product instead of three a call."""
    layers = [layer for layer in adapted if isinstance(layer, Linear) and _can_merge(layer, name)]
    for layer in layers:
        if forward := _merged_forward(layer, name):
            layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _merged_forward(layer: Linear, name: str) -> Callable[[Tensor], Tensor] | None:
    """Return the forward pass of a layer merged with its adapter; None if that would not be faster."""
    linear = layer.get_base_layer()
    assert isinstance(linear, nn.Linear)
    low_rank = layer.r[name] * (linear.in_features + linear.out_features)
    if linear.weight.numel() <= MERGE_UP_TO * low_rank:
        # A gradient of the whole weight costs less than the low-rank path.
        weight = linear.weight + layer.get_delta_weight(name)
        return partial(functional.linear, weight=weight, bias=linear.bias)
    if linear.weight.numel() > SMALL_WEIGHT:
        return None
    with torch.no_grad():
        weight = linear.weight + layer.get_delta_weight(name)
    return partial(
        merged_linear,
        weight=weight,
        bias=linear.bias,
        down=layer.lora_A[name].get_parameter("weight"),
        up=layer.lora_B[name].get_parameter("weight"),
        scaling=layer.scaling[name],
    )


def _can_merge(layer: Linear, name: str) -> bool:
    """Return whether the layer has adapter ``name`` without dropout on a weight that it can be added to."""
    linear = layer.get_base_layer()
    if type(linear) is not nn.Linear or linear.weight.dtype != torch.float32 or name not in layer.lora_A:
        return False  # a quantised or half-precision weight would round the update away
    dropout = layer.lora_dropout[name]
    return not (isinstance(dropout, nn.Dropout) and dropout.training)


def train_mode(model: PeftModel) -> None:
    """Switch on the adapters' own dropout: the base's would make the reference and old log_probs random."""
    for name, module in model.eval().named_modules():
        if name.endswith(".lora_dropout"):
            module.train()


def state_dict(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return a copy of the adapter's weights on the CPU under peft's file names."""
    # save_embedding_layers="auto" would look the base up on the hub
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def save(
    model: PeftModel, name: str, folder: Path, *, base: Fingerprint, score: Tensor | None = None
) -> None:
    """Write adapter ``name`` in peft's format; ``score`` (1, D) is a reward model's head.

    With a score head the folder is a SEQ_CLS adapter, which ``PeftModel.from_pretrained`` attaches to a
    sequence classification model with num_labels=1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = state_dict(model, name)
    record: dict[str, Any] = model.peft_config[name].to_dict()
    record = {key: sorted(value) if isinstance(value, set) else value for key, value in record.items()}
    record |= {"base_model_name_or_path": base.weights, "inference_mode": True}
    if score is not None:
        weights[SCORE_KEY] = score.detach().cpu().clone().contiguous()
        record |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(record, indent=1, sort_keys=True, default=str) + "\n")
    save_fingerprint(base, folder)


def load(model: PreTrainedModel | PeftModel, name: str, folder: Path) -> tuple[PeftModel, Tensor | None]:
    """Attach the adapter of ``folder`` to ``model``, frozen; return also its score head (1, D), if any."""
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    config.modules_to_save, config.task_type, config.inference_mode = None, "CAUSAL_LM", True
    weights = load_file(folder / WEIGHTS)
    score = weights.pop(SCORE_KEY, None)
    model = attach(model, name, config)
    load_state_dict(model, name, weights)
    return model, score


def load_state_dict(model: PeftModel, name: str, weights: Mapping[str, Tensor]) -> None:
    """Copy weights under peft's file names into adapter ``name``.

    Raises InputError if one is missing or unknown.
    """
    expected = set(state_dict(model, name))
    if expected != set(weights):
        raise InputError(
            f"This adapter does not fit this base: {len(expected ^ set(weights))} of its tensors are missing "
            "or unknown."
        )
    set_peft_model_state_dict(model, dict(weights), adapter_name=name)


def new_head(width: int) -> nn.Linear:
    """Create a scalar head in fp32 (torch's global seed): std 1 / sqrt(D + 1) (Huang et al. 2024), bias 0."""
    head = nn.Linear(width, 1, dtype=torch.float32)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    nn.init.zeros_(head.bias)
    return head
