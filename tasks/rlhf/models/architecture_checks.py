"""Refuse models whose results would be wrong: too short a context, or logits changed after the head."""

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.system.errors import InputError

MAX_LOGIT_GAP = 1e-3


LIMITS = "text.max_prompt_tokens + text.max_answer_tokens"


def check_context(model: PreTrainedModel, num_tokens: int, *, settings: str = LIMITS) -> None:
    """Raise InputError if the model has no positions for texts of ``num_tokens``, which ``settings`` allow.

    Packed blocks may be longer: position ids restart with every text, and padding never gets a larger one
    than the texts.
    """
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):  # the latter is MPT's
        limit = getattr(config, name, None)
        if isinstance(limit, int) and num_tokens > limit:
            raise InputError(
                f"{settings} is {num_tokens}, but this model reads {limit} tokens at most: lower them to fit."
            )
    threshold = _longrope_threshold(config)
    if threshold is not None and num_tokens > threshold:
        raise InputError(
            f"{settings} is {num_tokens}, but this model (rope type "
            "longrope) "
            f"computes all texts of a batch in another way if one has more than {threshold} tokens: "
            "lower them to fit."
        )


def _longrope_threshold(config: PretrainedConfig) -> int | None:
    """Return the length above which longrope changes frequencies for the whole batch; None if it is not."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    default = getattr(config, "original_max_position_embeddings", None)
    threshold = rope.get("original_max_position_embeddings") or default
    return threshold if isinstance(threshold, int) else None


def check_head(model: PreTrainedModel) -> None:
    """Raise InputError unless logits are the output head of the last hidden states, not scaled or capped."""
    probe = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(probe, use_cache=False).logits
        gap = (logits - output_head(model)(hidden_states(model, probe))).abs().max().item()
        gap = max(gap, _change_of_logits(model, probe))
    if gap > MAX_LOGIT_GAP:
        raise InputError(
            f"{model.config.model_type} models change their logits after the output head (by {gap:.3g}): "
            "they are not supported."
        )


def _change_of_logits(model: PreTrainedModel, probe: Tensor) -> float:
    """Return by how much the model changes logits of up to 100: a cap would not show in small ones."""
    size = model.config.get_text_config().vocab_size
    planted = torch.linspace(-100, 100, size, device=model.device, dtype=model.dtype).expand(*probe.shape, -1)
    hook = output_head(model).register_forward_hook(lambda *_: planted.clone())
    try:
        logits: Tensor = model(probe, use_cache=False).logits
    finally:
        hook.remove()
    return (logits - planted).abs().max().item()
