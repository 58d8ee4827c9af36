"""Build attention masks for several texts in one row, or compute one text per row without them.

A mask that is passed to a model replaces its own, and with it sliding windows and chunks. So transformers'
rule for every kind of layer is evaluated at the tokens' position ids and combined with the mask of tokens
that belong together.
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

# transformers' mask function of a layer: (batch, head, query position, key position) -> bool, broadcast.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LayerRules = (
    dict[str, Rule | None] | Rule | None
)  # by kind of layer, or of all layers; None: no attention mask

_CAUSAL: Any = causal_mask_function
# An attention implementation whose "mask" is the rule itself; no model computes with it.
_RULE = "alignflow_rule"
_one_text_per_row: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def _take_rule(*_: Any, mask_function: Rule, **__: Any) -> Rule:
    return mask_function


AttentionMaskInterface.register(_RULE, _take_rule)


def layer_rules(config: PretrainedConfig, device: torch.device | None = None) -> LayerRules:
    """Return the mask functions of a model's layers."""
    text_config = copy.copy(config.get_text_config())
    text_config._attn_implementation = _RULE
    rules: LayerRules = create_masks_for_generate(
        config=text_config,
        inputs_embeds=torch.empty(1, 1, 1, device=device),
        attention_mask=None,
        past_key_values=None,
    )
    return rules


def build_attention_mask(
    model: PreTrainedModel, visible: Tensor, position_ids: Tensor | None
) -> Tensor | dict[str, Tensor]:
    """Return the mask to add to attention scores, (B, 1, T, T); one per kind of layer if they differ.

    ``visible`` (B, T, T) bool is True where a token may attend to another, ``position_ids`` (B, T) are
    relative to the beginning of each text.
    """
    rules = layer_rules(model.config, visible.device)
    if all(rule is _CAUSAL or rule is None for rule in _rule_list(rules)):  # ``visible`` is causal already
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
    """Return 0 where ``visible`` is True and the lowest number elsewhere, (B, 1, T, T), for any kernel."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def _rule_list(rules: LayerRules) -> list[Rule | None]:
    return list(rules.values()) if isinstance(rules, dict) else [rules]


# ------------------------------------------------------------------------------------------ one text per row


def decoder(model: PreTrainedModel) -> nn.Module:
    """Return the part of the model that computes hidden states."""
    base = model.base_model
    return model.get_submodule("model") if base is model else base  # Llama 4's base_model_prefix is wrong


def reason_for_one_text_per_row(model: PreTrainedModel) -> str | None:
    """Return why this model cannot have several texts in one row, if its code or configuration shows it."""
    config = model.config.get_text_config()
    if "position_ids" not in inspect.signature(decoder(model).forward).parameters:
        return "the model does not accept position ids"
    if getattr(config, "alibi", False):
        return "ALiBi computes distances between tokens from their columns in the row"
    if not all(map(callable, _rule_list(layer_rules(config)))):
        return "it has layers without attention masks"
    return None


def use_one_text_per_row(model: PreTrainedModel) -> None:
    """Compute every text of this model in a row of its own from now on, with the plain forward pass."""
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
    """Return the hidden states of all tokens of rows (R, T), (R * T, D), computed with one row per text.

    ``texts`` are the flat indices of each text's tokens. A token in several texts, as in a shared prompt,
    gets the value of the first; a token in none gets zeros. Texts of similar length are one call.
    """
    groups: dict[int, list[list[int]]] = {}
    for text in texts:
        groups.setdefault(0 if in_one_call else len(text).bit_length(), []).append(text)
    flat, device = input_ids.flatten(), input_ids.device
    hidden: list[Tensor] = []
    source_of: dict[int, int] = {}  # by flat index: row of the first hidden state computed for it
    count = 0
    for group in groups.values():
        width = max(map(len, group))
        for text in group:
            for column, index in enumerate(text):
                source_of.setdefault(index, count + column)
            count += width
        padded = [text + text[-1:] * (width - len(text)) for text in group]
        hidden.append(forward(flat[torch.tensor(padded, device=device)]).flatten(0, 1))
    indices = torch.tensor(list(source_of.keys()), device=device)
    sources = torch.tensor(list(source_of.values()), device=device)
    empty = hidden[0].new_zeros(len(flat), hidden[0].shape[-1])
    return empty.index_copy(0, indices, torch.cat(hidden)[sources])
