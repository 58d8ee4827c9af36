"""Compute the attention of short texts in float32 on a CPU, in models of half precision.

torch's backward pass in bfloat16 has costs that do not shrink with the text. Measured on a Xeon with AMX,
forward and backward, 3,072 tokens of 8 heads, in milliseconds (bfloat16, converted to float32 and back):
heads of 32: 41 and 12 with texts of 96 tokens, 28 and 19 with 256; heads of 64: 46 and 24 with 96, 33 and 37
with 256; heads of 128: 54 and 49 with 96, 41 and 65 with 192.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

FEW_ELEMENTS = 12_288  # of a text's queries in one head, tokens times width; above it bfloat16 is faster


def use_float32_for_short_texts() -> None:
    """Let transformers' models that compute attention with torch's own function do so in this process."""
    AttentionInterface.register("sdpa", attend)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Return what transformers' own function returns, (B, T, H, D); query (B, H, T, D)."""
    if query.device.type != "cpu" or not is_slow_in_half(query):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **settings
    )
    return output.to(query.dtype), None


def is_slow_in_half(query: Tensor) -> bool:
    """Return whether queries are bfloat16 and those of a short text, which a CPU computes in float32.

    Those of a single token have no backward pass.
    """
    tokens, width = query.shape[-2:]
    return query.dtype == torch.bfloat16 and tokens > 1 and tokens * width <= FEW_ELEMENTS
