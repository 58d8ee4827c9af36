"""Configure quantised linear layers, return the weights that they compute with, and make them differentiable.

Quantised are the matrices of the decoder's layers: int8 with a scale per row, as LLM.int8 stores them
(Dettmers et al. 2022, arXiv 2208.07339); nf4 is QLoRA's 4-bit NormalFloat with double quantisation (Dettmers
et al. 2023, arXiv 2305.14314). Embeddings, output head and norms keep the stored dtype, in which everything
is computed: what a base computes depends on its folder and its precision, not on the machine. The exception
is a CPU without bfloat16 instructions, which computes with the same weights in float32.

LLM.int8 also rounds each product's input, except for the columns with an outlier anywhere in the batch. So a
row's result depends on the rows and the padding beside it: on a 260k model its log-probabilities moved by up
to 0.4, past PPO's clipping range before the first update. Here the input is not rounded: rows are
independent, as they are with nf4, and a merged adapter computes what it did on its base.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, PreTrainedModel

from tasks.system.errors import InputError

Stored = Literal["float32", "bfloat16", "float16"]
Precision = Literal["float32", "bfloat16", "int8", "nf4"]
READ_BY_PEFT = ("compress_statistics", "quant_type")
SCHEMES = {"Linear8bitLt": "int8", "Linear4bit": "nf4"}  # by bitsandbytes' class of layer


def quantisation_config(precision: Precision) -> BitsAndBytesConfig:
    """Return transformers' configuration for "int8" or "nf4".

    Raises InputError if a library for it is missing.
    """
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"A base in {precision} needs {' and '.join(missing)}: pip install 'alignflow[gpu]'."
        )
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def _quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the quantised layers by name."""
    for name, module in model.named_modules():
        if type(module).__name__ in SCHEMES:
            yield name, module


def scheme(model: nn.Module) -> str | None:
    """Return "int8" or "nf4", None if the model is not quantised."""
    schemes = {SCHEMES[type(layer).__name__] for _, layer in _quantised_layers(model)}
    assert len(schemes) < 2
    return schemes.pop() if schemes else None


def mismatched_weights(model: nn.Module) -> Iterator[str]:
    """Yield names of quantised weights whose shape is not their layer's, which transformers 5.23 allows."""
    for name, layer in _quantised_layers(model):
        assert isinstance(layer.weight, nn.Parameter)
        state = vars(layer.weight).get("quant_state")  # 4-bit codes are stored in one row
        shape = getattr(state, "shape", layer.weight.shape)
        if tuple(shape) != (layer.out_features, layer.in_features):
            yield f"{name}.weight"


def use_exact_products(model: PreTrainedModel) -> None:
    """Make every quantised layer compute x W^T with the W of `dense_weights`, differentiable, as stored."""
    for _, layer in _quantised_layers(model):
        if type(layer).__name__ == "Linear8bitLt":
            vars(layer)["scale"] = vars(layer.weight)["SCB"]  # no part of a weight that is split over ranks
            layer.forward = partial(_int8_linear, layer)
        else:
            # The kernel for CPUs with AVX512-BF16 repacks the weights at the first forward pass in eval mode,
            # and has no backward pass then.
            vars(layer).update(
                compute_dtype=model.dtype, compute_type_is_set=True, support_avx512bf16_for_cpu=False
            )
            # bitsandbytes takes it from there if the weight has lost it, as one that is split over ranks has
            vars(layer)["quant_state"] = vars(layer.weight)["quant_state"]


def move_scales(model: nn.Module, device: torch.device) -> None:
    """Move what quantised layers compute their weights with, beside the codes, to ``device``."""
    for _, layer in _quantised_layers(model):
        if type(layer).__name__ == "Linear8bitLt":
            vars(layer)["scale"] = vars(layer)["scale"].to(device)
        else:
            vars(layer)["quant_state"].to(device)  # in place


@contextmanager
def kept_attributes(model: nn.Module) -> Iterator[None]:
    """Give quantised weights, which a block replaces by others, the attributes that peft reads."""
    layers = dict(_quantised_layers(model))
    kept = {}
    for name, layer in layers.items():
        kept[name] = {key: value for key, value in vars(layer.weight).items() if key in READ_BY_PEFT}
    yield
    for name, layer in layers.items():
        vars(layer.weight).update(kept[name])


def _int8_linear(layer: nn.Module, x: Tensor) -> Tensor:
    scale = vars(layer)["scale"]
    output: Tensor = _Int8Product.apply(x, layer.weight, scale, layer.bias)  # type: ignore[no-untyped-call]
    return output


class _Int8Product(torch.autograd.Function):
    """x W^T + b for codes and scales of W.

    W exists only during the product, so the backward pass computes it again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return functional.linear(x, _int8_weight(codes, scale).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ _int8_weight(*ctx.saved_tensors).to(gradient.dtype), None, None, None


def _int8_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """Return W (out, in) in float32 from codes in -127..127 and each row's largest absolute value (out,)."""
    return codes.data.float() * (scale.float() / 127)[:, None]


def dense_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrix (out, in) that each quantised layer computes with, by the layer's name."""
    for name, layer in _quantised_layers(model):
        yield name, _dense_weight(layer)


def _dense_weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if type(layer).__name__ == "Linear8bitLt":
        return _int8_weight(weight, vars(weight)["SCB"])
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, vars(weight)["quant_state"])
