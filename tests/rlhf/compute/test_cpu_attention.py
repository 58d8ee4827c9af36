"""Test that short texts attend in float32 on a CPU, and that nothing else changes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tasks.rlhf.compute import cpu_attention, devices
from tests.support import tiny

HEADS, WIDTH = 4, 32


class Attention(nn.Module):
    """What transformers' function reads of a layer."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = True, groups


def inputs(tokens: int, *, groups: int = 1, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    heads = (HEADS, HEADS // groups, HEADS // groups)
    return [torch.randn(2, count, tokens, WIDTH, generator=draw).to(dtype) for count in heads]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("is_masked", [False, True])
def test_short_texts_are_rounded_once(groups: int, is_masked: bool) -> None:
    query, key, value = inputs(24, groups=groups)
    mask = None
    if is_masked:
        blocked = torch.ones(24, 24).triu(1).bool()
        mask = torch.zeros(2, 1, 24, 24, dtype=query.dtype).masked_fill(blocked, torch.finfo(query.dtype).min)
    output, _ = cpu_attention.attend(Attention(groups), query, key, value, mask)
    exact = functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True, enable_gqa=groups > 1
    ).transpose(1, 2)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, exact.to(torch.bfloat16), atol=1e-6, rtol=2**-7)
    differ = (output != exact.to(torch.bfloat16)).double().mean().item()
    assert differ < 0.002  # by the rounding of float32


@pytest.mark.parametrize(
    ("tokens", "dtype"), [(0, torch.bfloat16), (400, torch.bfloat16), (24, torch.float32)]
)
def test_the_rest_is_transformers_own(tokens: int, dtype: torch.dtype) -> None:
    query, key, value = inputs(tokens or 24, dtype=dtype)
    if not tokens:  # a token is sampled
        query = query[:, :, -1:]
    output, _ = cpu_attention.attend(Attention(), query, key, value)
    assert torch.equal(output, sdpa_attention_forward(Attention(), query, key, value, None)[0])


def test_models_use_it_once_a_cpu_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    devices.set_up("cpu", 0)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is cpu_attention.attend
    asked = []
    monkeypatch.setattr(cpu_attention, "is_slow_in_half", lambda query: asked.append(query.dtype) is not None)
    model = tiny.model("llama").to(torch.bfloat16)
    logits = model(torch.arange(5, 12)[None]).logits
    assert asked
    assert set(asked) == {torch.bfloat16}
    assert logits.isfinite().all()
