"""Frozen bases of any precision: loading, weights as a quantised base computes with them, memory for time, and what an adapter belongs to.

Quantised are the matrices of the decoder's layers: int8 with a scale per row, as LLM.int8 stores them (Dettmers et al. 2022, arXiv 2208.07339); nf4
is QLoRA's 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv 2305.14314). Embeddings, output head and norms stay as stored,
and all is computed in the stored type: what a base computes is a matter of its folder and its precision, not of the machine; but a CPU without
instructions for bfloat16 computes with the same weights in float32.

LLM.int8 also rounds each product's input, but for the columns with an outlier anywhere in the batch. So a row's result depends on the rows and the
padding beside it: on a 260k model its log-probabilities moved by up to 0.4, past PPO's clipping range before the first update. Here the input is left
alone: rows are independent, as they are with nf4, and a merged adapter computes what it did on its base.
"""

import hashlib
import importlib.util
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from tasks.rlhf.models import quiet_libraries
from tasks.rlhf.refusal import InputError

Stored = Literal["float32", "bfloat16", "float16"]
Precision = Literal["float32", "bfloat16", "int8", "nf4"]
RECORD = "base.json"  # beside an adapter's own files
WEIGHTS = ("*.safetensors",)
ADAPTER = "adapter_config.json"
TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


def load(folder: Path, *, device: torch.device, precision: Precision | Stored | None = None) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder: safetensors, no remote code, eval mode, frozen. None keeps the stored type."""
    quiet_libraries()
    settings: dict[str, Any] = {"dtype": getattr(torch, precision) if precision in ("float32", "bfloat16", "float16") else "auto"}
    if precision in ("int8", "nf4"):
        settings |= {"quantization_config": _quantisation(precision), "device_map": {"": device}}
        if stored_in(folder) == torch.float16:
            settings["dtype"] = torch.bfloat16  # small gradients vanish in float16
    try:
        if hasattr(config_of(folder), "quantization_config"):
            raise InputError(f"{folder} is quantised already: give the folder of the model that it was made from, and the precision to load it in.")
        guards = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **guards, **settings)
    except ImportError as error:
        raise InputError(f"A base in {precision} needs other versions of bitsandbytes and accelerate: pip install 'alignflow[gpu]'.") from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded as a causal language model in safetensors format: {str(error).splitlines()[0]}") from error
    model: PreTrainedModel = loaded[0]
    wrong = {*loaded[1]["missing_keys"], *(key for key, *_ in loaded[1]["mismatched_keys"]), *_misshapen(model)}  # they would stay random
    if wrong:
        raise InputError(f"{folder} lacks {len(wrong)} tensors of its model or has them in another shape, first {min(wrong)}: save the model again.")
    model.requires_grad_(False)
    nn.Module.to(model, device)
    model.eval()
    _quicker(model, device)
    _settle(model)
    return model


def _quicker(model: PreTrainedModel, device: torch.device) -> None:
    """Let a CPU without instructions for bfloat16 compute with the same weights in float32; `stored` still tells of their type."""
    if model.dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.float()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it. Without them a product takes four times as long as in float32 (measured: 32 and 123 GFLOPS)."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return platform.machine().lower() not in ("x86_64", "amd64") or any(getattr(torch.cpu, name, lambda: True)() for name in asked)


def stored_in(folder: Path) -> torch.dtype:
    """The type of the weights in a model folder."""
    return getattr(config_of(folder), "dtype", None) or torch.float32


def config_of(folder: Path) -> PretrainedConfig:
    """A model folder's configuration. Raises InputError."""
    if (folder / ADAPTER).exists():  # transformers would load the base that the adapter names, and the adapter over it
        raise InputError(
            f"{folder} holds an adapter ({ADAPTER}): merge it into its base first (peft's merge_and_unload, save_pretrained) and give "
            "that folder, or move the adapter's files away."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} cannot be loaded as a causal language model in safetensors format: {str(error).splitlines()[0]}") from error
    return config


def stored(model: PreTrainedModel) -> torch.dtype:
    """The type in which the weights came, or were asked for, whatever this machine computes in."""
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _quantisation(precision: Precision) -> BitsAndBytesConfig:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"A base in {precision} needs {' and '.join(missing)}: pip install 'alignflow[gpu]'.")
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _quantised(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The quantised matrices by name."""
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt"))


def _misshapen(model: nn.Module) -> Iterator[str]:
    """Names of quantised weights of another shape than their layer's, which transformers 5.23 lets pass."""
    for name, layer in _quantised(model):
        assert isinstance(layer.weight, nn.Parameter)
        shape = getattr(vars(layer.weight).get("quant_state"), "shape", layer.weight.shape)  # 4-bit codes lie in one row
        if tuple(shape) != (layer.out_features, layer.in_features):
            yield f"{name}.weight"


def _settle(model: PreTrainedModel) -> None:
    """Let every quantised matrix compute as `dequantised` has it, with gradients, in the stored type."""
    for _, layer in _quantised(model):
        if type(layer).__name__ == "Linear8bitLt":
            layer.forward = partial(_int8_linear, layer)
        else:  # the kernel for CPUs with AVX512-BF16 repacks the weights at the first forward in eval mode, and then lets no gradient through
            vars(layer).update(compute_dtype=model.dtype, compute_type_is_set=True, support_avx512bf16_for_cpu=False)


def _int8_linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer.weight, nn.Parameter)
    output: Tensor = _Int8Product.apply(x, layer.weight, vars(layer.weight)["SCB"], layer.bias)  # type: ignore[no-untyped-call]
    return output


class _Int8Product(torch.autograd.Function):
    """x W^T + b for codes and scales of W; W itself lives only inside the product, so it is made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return functional.linear(x, _int8_weight(codes, scale).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ _int8_weight(*ctx.saved_tensors).to(gradient.dtype), None, None, None


def _int8_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """W (out, in) in float32 of codes in -127..127 and each row's largest absolute value (out,)."""
    return codes.data.float() * (scale.float() / 127)[:, None]


def precision_of(model: PreTrainedModel) -> str:
    """int8, nf4, or the type of the weights."""
    kinds = {type(layer).__name__ for _, layer in _quantised(model)}
    assert len(kinds) < 2
    return {"Linear8bitLt": "int8", "Linear4bit": "nf4"}[kinds.pop()] if kinds else str(stored(model)).removeprefix("torch.")


def _weight(layer: nn.Module) -> Tensor:
    """The matrix (out, in) that a quantised layer computes with."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if type(layer).__name__ == "Linear8bitLt":
        return _int8_weight(weight, vars(weight)["SCB"])
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, vars(weight)["quant_state"])


def dequantised(folder: Path, *, device: torch.device, precision: Precision | Stored | None, dtype: Stored | None = None) -> PreTrainedModel:
    """The folder's model in ``dtype`` (None: the stored type) with the weights that it has in ``precision``: what to merge an adapter into.

    An adapter has learnt to mend the rounding of the base that it was trained on. Measured on a 260k model after 60 steps on nf4, as largest and mean
    difference of logits to the adapter on its base: merged into these weights 1e-4 and 5e-6 in float32, 0.7 and 0.07 in bfloat16; into
    the folder's own 14 and 1.0 in either.
    """
    model = load(folder, device=device, precision=dtype)
    if precision not in ("int8", "nf4"):
        return model
    layers = dict(model.named_modules())
    for name, quantised in _quantised(load(folder, device=device, precision=precision)):
        layer = layers[name]
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(_weight(quantised).T if isinstance(layer, Conv1D) else _weight(quantised))  # GPT-2 keeps its matrices the other way round
    return model


# ----------------------------------------------------------------------------------------------------------------- memory for time


def gradient_checkpointing(model: nn.Module) -> None:
    """From now on a decoder layer keeps its input alone for the backward pass, which computes the rest again: bit for bit the same gradients.

    transformers' own switch works in training mode only, where the base's dropout is on. This one asks whether gradients are on. A forward pass that
    fills a cache is left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no layers that can be computed again in the backward pass: switch gradient checkpointing off.")
    for layer in layers:
        assert "forward" not in vars(layer), "it is on already"
        layer.forward = partial(_recomputed, layer, layer.forward)


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled() or any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
        return forward(*args, **kwargs)
    before = _adapters_in(layer)

    def again(*args: Any, **kwargs: Any) -> Any:
        assert _adapters_in(layer) == before, "backward must be called before the adapters of its forward pass are switched"
        return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, **kwargs)


def _adapters_in(layer: nn.Module) -> list[object]:
    """What the layer's matrices compute with: the active adapters, none, or one folded in."""
    tuned = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    return [(module.active_adapters, module.disable_adapters, "forward" in vars(module)) for module in tuned]


# ------------------------------------------------------------------------------------------------------- what an adapter belongs to


class Fingerprint(NamedTuple):
    """A base as an adapter knows it."""

    weights: str  # sha256 over the safetensors files
    tokenizer: str  # sha256 over its files
    precision: str  # as of `precision_of`
    compute: str  # type of the activations, unless a CPU takes float32 for speed


def fingerprint(folder: Path, model: PreTrainedModel) -> Fingerprint:
    """That of ``model``, loaded from ``folder``."""
    return Fingerprint(_digest(folder, WEIGHTS), _digest(folder, TOKENIZER), precision_of(model), str(stored(model)).removeprefix("torch."))


def _digest(folder: Path, patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def record(base: Fingerprint, folder: Path) -> None:
    """Write down in an adapter's folder what it was trained on."""
    (folder / RECORD).write_text(json.dumps(base._asdict(), indent=1) + "\n")


def recorded(folder: Path) -> Fingerprint:
    """What the adapter in ``folder`` was trained on."""
    try:
        return Fingerprint(**json.loads((folder / RECORD).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder} does not say in {RECORD} which base the adapter was trained on: train it again.") from error


def check(folder: Path, actual: Fingerprint, *, setting: str) -> None:
    """Refuse an adapter that was trained on another base; ``setting`` is the name under which the user chooses the precision."""
    if told := mismatch(recorded(folder), actual, setting=setting):
        raise InputError(told)


def mismatch(trained: Fingerprint, actual: Fingerprint, *, setting: str) -> str | None:
    """A sentence on all that differs, None where nothing does; ``setting`` is the name under which the user chooses the precision."""
    differences = []
    if trained.weights != actual.weights:
        differences.append(f"its base's weights were {trained.weights[:15]} and these are {actual.weights[:15]} (give the base it was trained on)")
    if trained.tokenizer != actual.tokenizer:
        differences.append(f"its tokenizer was {trained.tokenizer[:15]} and this one is {actual.tokenizer[:15]} (put the base's files back)")
    if trained.precision != actual.precision:
        differences.append(
            f"it was trained on a base in {trained.precision} and this one is in {actual.precision} (set {setting} to {trained.precision})"
        )
    elif trained.compute != actual.compute:
        differences.append(f"its base computed in {trained.compute} and this one does in {actual.compute} (give the base as it was stored)")
    return f"The adapter does not belong to this base: {'; '.join(differences)}." if differences else None
