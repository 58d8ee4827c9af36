"""Attention masks for several texts in one row that keep the model's own windows, and plain rows for models without such masks.

A mask that is passed to a model replaces its own, and with it sliding windows and chunks. So the model's own rule of
every kind of layer is asked of transformers, evaluated at the places' positions in their texts, and combined with
which places may see each other at all.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function, create_masks_for_generate

# (batch, head, query position, key position) -> bool, broadcast: how transformers writes down what a layer sees.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_CAUSAL: Any = causal_mask_function
_RULE = (
    "alignflow_rule"  # an attention implementation whose "mask" is the rule itself; no model computes with it
)
_one_text_per_row: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def _take_rule(*_: Any, mask_function: Rule, **__: Any) -> Rule:
    return mask_function


AttentionMaskInterface.register(_RULE, _take_rule)


def layer_rules(
    config: PretrainedConfig, device: torch.device | None = None
) -> dict[str, Rule | None] | Rule | None:
    """Return what layers see by kind of layer, or the one rule of all layers. None: the layer has no attention mask."""
    asked = copy.copy(config.get_text_config())
    asked._attn_implementation = _RULE
    rules: dict[str, Rule | None] | Rule | None = create_masks_for_generate(
        config=asked,
        inputs_embeds=torch.empty(1, 1, 1, device=device),
        attention_mask=None,
        past_key_values=None,
    )
    return rules


def build_attention_mask(
    model: PreTrainedModel, visible: Tensor, position_ids: Tensor | None
) -> Tensor | dict[str, Tensor]:
    """Return the mask to add to the attention scores, (B, 1, T, T), one per kind of layer where they differ.

    ``visible`` (B, T, T) bool says which places may see each other, ``position_ids`` (B, T) their places in their text.
    """
    rules = layer_rules(model.config, visible.device)
    found = list(rules.values()) if isinstance(rules, dict) else [rules]
    if all(rule is _CAUSAL or rule is None for rule in found):  # ``visible`` is causal already
        return _additive(visible, model.dtype)
    if position_ids is None:
        position_ids = torch.arange(visible.shape[1], device=visible.device)[None]
    if not isinstance(rules, dict):
        assert rules is not None
        return _additive(_apply_rule(visible, rules, position_ids), model.dtype)
    return {
        kind: _additive(_apply_rule(visible, rule, position_ids), model.dtype)
        for kind, rule in rules.items()
        if rule is not None
    }


def _apply_rule(visible: Tensor, rule: Rule, position_ids: Tensor) -> Tensor:
    if rule is _CAUSAL:
        return visible
    first = position_ids.new_zeros(1, 1, 1)  # no rule differs by row or head
    return visible & rule(first, first, position_ids[:, :, None], position_ids[:, None, :])


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a place is visible and the lowest number elsewhere: every kind of attention adds that."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


# ------------------------------------------------------------------------------------------ one text a row


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of the model that makes hidden states."""
    found = model.base_model
    return model.get_submodule("model") if found is model else found  # Llama 4's prefix names nothing


def reason_for_one_text_per_row(model: PreTrainedModel) -> str | None:
    """Return why this model cannot have several texts in one row, if that can be told from its kind."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(decoder(model).forward).parameters:
        return "the model cannot be told the positions of its tokens"
    if getattr(config, "alibi", False):
        return "ALiBi takes distances between tokens from their places in the row"
    rules = layer_rules(config)
    if any(not callable(rule) for rule in (rules.values() if isinstance(rules, dict) else [rules])):
        return "it has layers without attention masks"
    return None


def use_one_text_per_row(model: PreTrainedModel) -> None:
    """From now on compute every text in a row of its own, by the model's plain forward pass."""
    _one_text_per_row.add(model)


def has_one_text_per_row(model: PreTrainedModel) -> bool:
    """Return whether `keep_texts_apart` was called."""
    return model in _one_text_per_row


def forward_one_text_per_row(
    forward: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    texts: list[list[int]],
    *,
    in_one_call: bool = False,
) -> Tensor:
    """Return the hidden states of all places of rows (R, T), (R * T, D), from one row per text.

    ``texts`` are the places of each text's tokens, counted through the rows. A place in several texts, as those of a
    shared prompt, has the value of the first; a place in none has zeros. Texts of like length are called together.
    """
    groups: dict[int, list[list[int]]] = {}
    for text in texts:
        groups.setdefault(0 if in_one_call else len(text).bit_length(), []).append(text)
    flat, device = input_ids.flatten(), input_ids.device
    hidden: list[Tensor] = []
    first: dict[int, int] = {}  # of each place, where its hidden state is
    count = 0
    for some in groups.values():
        width = max(map(len, some))
        for text in some:
            for column, place in enumerate(text):
                first.setdefault(place, count + column)
            count += width
        rows = torch.tensor(
            [text + text[-1:] * (width - len(text)) for text in some], device=device
        )  # right padding
        hidden.append(forward(flat[rows]).flatten(0, 1))
    places, sources = (torch.tensor(list(some), device=device) for some in (first.keys(), first.values()))
    empty = hidden[0].new_zeros(len(flat), hidden[0].shape[-1])
    return empty.index_copy(0, places, torch.cat(hidden)[sources])
