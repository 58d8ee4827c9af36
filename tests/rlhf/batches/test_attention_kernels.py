"""Test that FlashAttention is told the documents, and FlexAttention gets blocks: neither a mask of T x T.

There is no GPU in the tests. FlashAttention's place takes a function that computes what its kernel would from
the arguments that reach it; FlexAttention runs as it is, but not compiled.
"""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import flex_attention as hf_flex_attention
from transformers.masking_utils import flash_attention_mask

from tasks.programs.runtime.training_setup import check_attention
from tasks.rlhf.batches import attention_masks, forward, layout_checks, shared_prompt
from tasks.rlhf.batches.comparisons import Comparison
from tasks.rlhf.batches.packing import Blocks, pack
from tasks.rlhf.models import loading
from tasks.system.errors import InputError
from tests.rlhf.batches.test_attention import MIXED, QUESTIONS
from tests.support import attention_models, tiny

FAMILIES = ("llama", "gpt2", "qwen2", "gpt_neox", "opt", "mistral", "gemma3")
FAKE = "flash_attention_fake"


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """Return two blocks of documents on both sides of the window, in one batch."""
    made = pack(MIXED, block_tokens=100, pad_id=tiny.PAD)
    assert len(made.labels) == 2
    return made


def packed(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    return forward.hidden_states(model, blocks.input_ids, blocks.position_ids)


@torch.no_grad()
def apart(model: PreTrainedModel, blocks: Blocks) -> Tensor:
    """Return the hidden states of each document alone, in the blocks' places, by the model's own forward."""
    rows = []
    for ids, positions in zip(blocks.input_ids, blocks.position_ids, strict=True):
        starts = [*torch.where(positions == 0)[0].tolist(), len(ids)]
        rows.append(torch.cat([forward.hidden_states(model, ids[a:b][None])[0] for a, b in pairwise(starts)]))
    return torch.stack(rows)


def shared_log_probs(model: PreTrainedModel, questions: list[Comparison]) -> Tensor:
    asked = [(c.prompt, c.answers) for c in questions]
    batch = shared_prompt.join(asked, pad_id=tiny.PAD, device=tiny.CPU, hidden_size=tiny.WIDTH)
    return shared_prompt.log_probs(model, batch)


# ---------------------------------------------------------------------------------- FlashAttention


def flash(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute each document of one row alone, as the kernel for several lengths does."""
    assert attention_mask is None
    assert query.shape[0] == 1
    assert cu_seq_lens_q.dtype == cu_seq_lens_k.dtype == torch.int32
    assert torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    bounds = cu_seq_lens_q.tolist()
    assert max_length_q == max_length_k == max(b - a for a, b in pairwise(bounds))
    assert bounds[-1] == query.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = []
    for a, b in pairwise(bounds):
        place = torch.arange(b - a)
        distance = place[:, None] - place[None, :]
        mask = (distance >= 0) & (distance < (sliding_window or b - a))
        q, k, v = (x[:, :, a:b] for x in (query, key, value))
        parts.append(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.fixture
def fake_flash() -> Iterator[None]:
    AttentionInterface.register(FAKE, flash)
    AttentionMaskInterface.register(FAKE, flash_attention_mask)
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping[FAKE]


@pytest.mark.usefixtures("fake_flash")
@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_flash_attention_is_told_the_documents_of_all_rows(kind: str, blocks: Blocks) -> None:
    model = attention_models.model(kind)
    wanted = apart(model, blocks)
    model.config._attn_implementation = FAKE
    torch.testing.assert_close(packed(model, blocks), wanted, atol=1e-4, rtol=1e-4)


def test_lengths_of_documents() -> None:
    lengths = attention_masks.document_lengths(torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3]]))
    assert lengths["cu_seq_lens_q"].tolist() == [0, 3, 4, 8]
    assert (lengths["max_length_q"], lengths["max_length_k"]) == (4, 4)


@pytest.mark.usefixtures("fake_flash")
def test_flash_attention_computes_answers_apart() -> None:
    model = attention_models.model("mistral")
    sdpa = shared_log_probs(model, QUESTIONS)
    model.config._attn_implementation = FAKE
    with pytest.raises(ValueError, match="no mask for answers that share a prompt"):
        shared_log_probs(model, QUESTIONS)
    reason = layout_checks._measure_or_reason(
        lambda: layout_checks.sharing_gap(model, QUESTIONS, pad_id=tiny.PAD)
    )[1]
    assert reason is not None
    model.config._attn_implementation = "sdpa"
    attention_masks.use_one_text_per_row(model)  # what the check then does
    torch.testing.assert_close(shared_log_probs(model, QUESTIONS), sdpa, atol=1e-3, rtol=1e-4)


# ----------------------------------------------------------------------------------- FlexAttention


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers call FlexAttention without a compiler."""

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **how: Any) -> Any:
        return flex_attention.flex_attention(query, key, value, **how)

    monkeypatch.setattr(hf_flex_attention, "compile_friendly_flex_attention", plain)
    monkeypatch.setattr(flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})


def flex_model(kind: str) -> PreTrainedModel:
    model = attention_models.model(kind)
    model.set_attn_implementation("flex_attention")
    return model


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize("kind", [*(kind for kind in FAMILIES if kind != "gpt2"), "gemma2", "phi3", "llama4"])
@torch.no_grad()
def test_flex_attention_keeps_documents_and_answers_apart(kind: str, blocks: Blocks) -> None:
    model, plain = flex_model(kind), attention_models.model(kind)
    torch.testing.assert_close(packed(model, blocks), apart(plain, blocks), atol=1e-4, rtol=1e-4)
    wanted = shared_log_probs(plain, QUESTIONS)
    torch.testing.assert_close(shared_log_probs(model, QUESTIONS), wanted, atol=1e-3, rtol=1e-4)


@pytest.mark.usefixtures("flex")
@pytest.mark.parametrize(("kind", "num_masks"), [("llama", 1), ("mistral", 1), ("gemma3", 2)])
def test_flex_attention_gets_blocks_and_no_number_for_each_two_tokens(
    kind: str, num_masks: int, blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = flex_model(kind), []
    attention_masks.decoder(model).register_forward_pre_hook(
        lambda _, __, named: given.append(named["attention_mask"]), with_kwargs=True
    )
    packed(model, blocks)
    (mask,) = given
    masks = [*mask.values()] if isinstance(mask, dict) else [mask]
    assert len(masks) == num_masks
    for one in masks:
        assert isinstance(one, BlockMask)
        assert one.shape == (2, 1, 100, 100)


# ------------------------------------------------------------------------------------- the setting


@pytest.mark.parametrize(
    ("attention", "device", "precision", "message"),
    [
        ("flex_attention", "cpu", "bfloat16", "machine.attention=flex_attention needs a GPU"),
        ("flash_attention_2", "cuda", "bfloat16", "needs flash-attn: pip install flash-attn"),
    ],
)
def test_kernels_that_cannot_compute_here_are_refused(
    attention: str, device: str, precision: Any, message: str
) -> None:
    check_attention("sdpa", torch.device("cpu"), "float32")
    with pytest.raises(InputError, match=message):
        check_attention(attention, torch.device(device), precision)


def test_a_model_without_these_kernels_is_refused(tmp_path: Path) -> None:
    attention_models.model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"^gpt2 models do not compute with machine\.attention=flex_attention"
    ):
        loading.load(tmp_path, device=tiny.CPU, attention="flex_attention")


def test_flash_attention_needs_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    check_attention("flash_attention_2", torch.device("cuda"), "nf4")
    for precision in ("float32", torch.float32):
        with pytest.raises(InputError, match=r"set weights\.\* to bfloat16"):
            check_attention("flash_attention_2", torch.device("cuda"), precision)  # type: ignore[arg-type]
