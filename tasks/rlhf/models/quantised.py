"""Frozen bases of any precision: loading, weights as a quantised base computes with them, memory for time, and what an adapter belongs to.

Quantised are the matrices of the decoder's layers: int8 with a scale per row, as LLM.int8 stores them (Dettmers et al. 2022, arXiv 2208.07339); nf4
is QLoRA's 4-bit NormalFloat with double quantisation (Dettmers et al. 2023, arXiv 2305.14314). Embeddings, output head and norms stay as stored,
and all is computed in the stored type: what a base computes is a matter of its folder and its precision, not of the machine; but a CPU without
instructions for bfloat16 computes with the same weights in float32.

LLM.int8 also rounds each product's input, but for the columns with an outlier anywhere in the batch. So a row's result depends on the rows and the
padding beside it: on a 260k model its log-probabilities moved by up to 0.4, past PPO's clipping range before the first update. Here the input is left
alone: rows are independent, as they are with nf4, and a merged adapter computes what it did on its base.
"""

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, PreTrainedModel

from tasks.system.errors import InputError

Stored = Literal["float32", "bfloat16", "float16"]
Precision = Literal["float32", "bfloat16", "int8", "nf4"]
ADAPTER = "adapter_config.json"


def quantisation_config(precision: Precision) -> BitsAndBytesConfig:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"A base in {precision} needs {' and '.join(missing)}: pip install 'alignflow[gpu]'."
        )
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The quantised matrices by name."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    )


def mismatched_weights(model: nn.Module) -> Iterator[str]:
    """Names of quantised weights of another shape than their layer's, which transformers 5.23 lets pass."""
    for name, layer in quantised_layers(model):
        assert isinstance(layer.weight, nn.Parameter)
        shape = getattr(
            vars(layer.weight).get("quant_state"), "shape", layer.weight.shape
        )  # 4-bit codes lie in one row
        if tuple(shape) != (layer.out_features, layer.in_features):
            yield f"{name}.weight"


def use_exact_products(model: PreTrainedModel) -> None:
    """Let every quantised matrix compute as `dequantised` has it, with gradients, in the stored type."""
    for _, layer in quantised_layers(model):
        if type(layer).__name__ == "Linear8bitLt":
            layer.forward = partial(_int8_linear, layer)
        else:  # the kernel for CPUs with AVX512-BF16 repacks the weights at the first forward in eval mode, and then lets no gradient through
            vars(layer).update(
                compute_dtype=model.dtype, compute_type_is_set=True, support_avx512bf16_for_cpu=False
            )


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


def dense_weight(layer: nn.Module) -> Tensor:
    """The matrix (out, in) that a quantised layer computes with."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    if type(layer).__name__ == "Linear8bitLt":
        return _int8_weight(weight, vars(weight)["SCB"])
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, vars(weight)["quant_state"])


# ----------------------------------------------------------------------------------------------------------------- memory for time


# ------------------------------------------------------------------------------------------------------- what an adapter belongs to
