"""Load a base model and its tokenizer from a Hugging Face folder."""

import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from tasks.rlhf.models import quantised
from tasks.rlhf.models.folder_tokenizer import load_tokenizer as load_tokenizer
from tasks.rlhf.models.folder_tokenizer import quiet_libraries
from tasks.rlhf.models.quantised import Precision, Stored
from tasks.system.errors import InputError

ADAPTER_CONFIG = "adapter_config.json"


def load(
    folder: Path,
    *,
    device: torch.device,
    precision: Precision | Stored | None = None,
    on_cpu: bool = False,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Load a causal language model from safetensors without remote code: frozen, in eval mode.

    None keeps the stored dtype, and ``attention`` is transformers' name of its kernels. ``on_cpu`` leaves a
    model that ``device`` cannot hold in the computer's memory; a quantised one is on ``device`` all the same,
    because only there its rounding is the usual one.

    Raises InputError if the folder holds an adapter, is quantised already, or lacks tensors of its model, or
    if the model has no such kernels.
    """
    quiet_libraries()
    model, missing = _from_pretrained(folder, device, precision)
    if attention != "sdpa":
        _use_attention(model, attention)
    wrong = missing | set(quantised.mismatched_weights(model))  # they would stay random
    if wrong:
        raise InputError(
            f"{folder} lacks {len(wrong)} tensors of its model or has them in another shape, first "
            f"{min(wrong)}: save the model again."
        )
    model.requires_grad_(False)
    if not on_cpu:
        nn.Module.to(model, device)
    model.eval()
    _upcast_on_slow_cpu(model, device)
    quantised.use_exact_products(model)
    return model


def _from_pretrained(
    folder: Path, device: torch.device, precision: Precision | Stored | None
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model and the names of tensors that are missing or of another shape. Raises InputError."""
    is_dtype = precision in ("float32", "bfloat16", "float16")
    settings: dict[str, Any] = {"dtype": getattr(torch, str(precision)) if is_dtype else "auto"}
    if precision in ("int8", "nf4"):
        settings["quantization_config"] = quantised.quantisation_config(precision)
        settings["device_map"] = {"": device}
        if folder_dtype(folder) == torch.float16:
            settings["dtype"] = torch.bfloat16  # small gradients vanish in float16
    try:
        if hasattr(load_config(folder), "quantization_config"):
            raise InputError(
                f"{folder} is quantised already: give the folder of the model that it was made from, and the "
                "precision to load it in."
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    except ImportError as error:
        raise InputError(
            f"A base in {precision} needs other versions of bitsandbytes and accelerate: "
            "pip install 'alignflow[gpu]'."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_loadable(folder, error) from error
    model, info = loaded
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _use_attention(model: PreTrainedModel, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{model.config.model_type} models do not compute with machine.attention={attention} here "
            f"({str(error).splitlines()[0]}): set it to sdpa."
        ) from error


def _not_loadable(folder: Path, error: Exception) -> InputError:
    reason = str(error).splitlines()[0]
    return InputError(f"{folder} cannot be loaded as a causal language model in safetensors format: {reason}")


def load_config(folder: Path) -> PretrainedConfig:
    """Load a model folder's configuration. Raises InputError."""
    if (folder / ADAPTER_CONFIG).exists():  # transformers would load the adapter over the base that it names
        raise InputError(
            f"{folder} holds an adapter ({ADAPTER_CONFIG}): merge it into its base first (peft's "
            "merge_and_unload, save_pretrained) and give that folder, or move the adapter's files away."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loadable(folder, error) from error
    return config


def _upcast_on_slow_cpu(model: PreTrainedModel, device: torch.device) -> None:
    """Convert bfloat16 weights to float32 on a CPU without bfloat16 instructions; `stored_dtype` stays."""
    if model.dtype == torch.bfloat16 and device.type == "cpu" and not has_fast_bfloat16():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.float()


def has_fast_bfloat16() -> bool:
    """Return whether this CPU has bfloat16 instructions.

    Without them a matrix product takes four times as long as in float32 (measured: 32 and 123 GFLOPS).
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    queries = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: True)() for name in queries)


def folder_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the weights in a model folder."""
    return getattr(load_config(folder), "dtype", None) or torch.float32


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Return the dtype in which the weights were stored or requested, whatever this machine computes in."""
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def precision_of(model: PreTrainedModel) -> str:
    """Return "int8", "nf4" or the stored dtype's name."""
    return quantised.scheme(model) or str(stored_dtype(model)).removeprefix("torch.")


def load_dequantised(
    folder: Path, *, device: torch.device, precision: Precision | Stored | None, dtype: Stored | None = None
) -> PreTrainedModel:
    """Load the model with its weights as rounded to ``precision``, to merge an adapter into.

    An adapter learns to correct the rounding of the base that it was trained on. Measured on a 260k model
    after 60 steps on nf4, as largest and mean difference of logits to the adapter on its base: merged into
    these weights 1e-4 and 5e-6 in float32, 0.7 and 0.07 in bfloat16; merged into the folder's own weights 14
    and 1.0 in either.
    """
    model = load(folder, device=device, precision=dtype)
    if precision not in ("int8", "nf4"):
        return model
    layers = dict(model.named_modules())
    for name, weight in quantised.dense_weights(load(folder, device=device, precision=precision)):
        layer = layers[name]
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(weight.T if isinstance(layer, Conv1D) else weight)  # GPT-2 stores transposes
    return model
