"""Build attention masks for several texts in one row, or compute one text per row without them.

A mask that is passed to a model replaces its own, and with it sliding windows and chunks. So transformers'
rule for every kind of layer is evaluated at the tokens' position ids and combined with the mask of tokens
that belong together. FlexAttention gets that as blocks; FlashAttention takes the lengths of documents.
"""

import copy
import inspect
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function, create_masks_for_generate

# transformers' mask function of a layer: (batch, head, query position, key position) -> bool, broadcast.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
LayerRules = (
    dict[str, Rule | None] | Rule | None
)  # by kind of layer, or of all layers; None: no attention mask

NONE = -1
FLEX, FLASH = "flex_attention", "flash_attention"  # transformers' names; flash_attention_2, _3 ...
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


class Segments(NamedTuple):
    """Which tokens of a row belong together: a token attends to earlier ones of its document, but to a branch
    only from within it. Answers that share a prompt are the branches of its document.
    """

    document: Tensor  # (B, T) int64
    branch: Tensor  # (B, T) int64; NONE: seen by the whole document


def documents(position_ids: Tensor) -> Segments:
    """Return the segments of packed documents, which begin where ``position_ids`` (B, T) are 0."""
    return Segments((position_ids == 0).cumsum(dim=1), torch.full_like(position_ids, NONE))


def build_attention_mask(
    model: PreTrainedModel, segments: Segments, position_ids: Tensor
) -> Tensor | BlockMask | dict[str, Tensor | BlockMask]:
    """Return the mask to pass to the model, one per kind of layer if they differ.

    For FlexAttention it is a table of blocks, without a number for each two tokens; else it is added to the
    attention scores, (B, 1, T, T). ``position_ids`` (B, T) are relative to the beginning of each text.
    """
    rules = layer_rules(model.config, position_ids.device)

    def build(rule: Rule | None) -> Tensor | BlockMask:
        sees = mask_function(segments, rule, position_ids)
        if model.config._attn_implementation == FLEX:
            return _block_mask(sees, position_ids)
        return _additive_mask(sees, position_ids, model.dtype)

    if not isinstance(rules, dict):
        return build(rules)
    causal = None  # one for all layers that have no rule of their own
    masks: dict[str, Tensor | BlockMask] = {}
    for kind, rule in rules.items():
        if rule is _CAUSAL:
            causal = build(rule) if causal is None else causal
            masks[kind] = causal
        elif rule is not None:
            masks[kind] = build(rule)
    if causal is not None and len({*map(id, masks.values())}) == 1:
        return causal
    return masks


def mask_function(segments: Segments, rule: Rule | None, position_ids: Tensor) -> Rule:
    """Return which token attends to which, as a function of indices: batch, head, query and key.

    It combines the segments with a layer's own rule, evaluated at the tokens' positions.
    """
    document, branch = segments

    def sees(batch: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        of_key = branch[batch, key]
        together = (of_key == NONE) | (of_key == branch[batch, query])
        found = (query >= key) & (document[batch, query] == document[batch, key]) & together
        if rule is None:
            return found
        return _apply_rule(found, rule, position_ids[batch, query], position_ids[batch, key])

    return sees


def _apply_rule(found: Tensor, rule: Rule, query: Tensor, key: Tensor) -> Tensor:
    if rule is _CAUSAL:  # ``found`` is causal already
        return found
    first = torch.zeros_like(query)  # no rule differs by row or head
    return found & rule(first, first, query, key)


def _block_mask(sees: Rule, position_ids: Tensor) -> BlockMask:
    num_rows, width = position_ids.shape
    device = position_ids.device
    # compiled, because it otherwise computes (B, 1, T, T) first
    build = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return build(sees, num_rows, None, width, width, device=device)


def _additive_mask(sees: Rule, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a token attends to another and the lowest number elsewhere, (B, 1, T, T)."""
    num_rows, width = position_ids.shape
    batch, place = (torch.arange(size, device=position_ids.device) for size in (num_rows, width))
    visible = sees(batch[:, None, None], batch[:1, None, None], place[None, :, None], place[None, None, :])
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


def document_lengths(position_ids: Tensor) -> dict[str, Any]:
    """Return the arguments by which FlashAttention keeps the documents of one row (1, T) apart."""
    starts = [*torch.where(position_ids[0] == 0)[0].tolist(), position_ids.shape[1]]
    ends = torch.tensor(starts, dtype=torch.int32, device=position_ids.device)
    longest = max(end - start for start, end in pairwise(starts))
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def use_one_text_per_row(model: PreTrainedModel) -> None:
    """Compute every text of this model in a row of its own from now on, with the plain forward pass."""
    _one_text_per_row.add(model)


def has_one_text_per_row(model: PreTrainedModel) -> bool:
    """Return whether `use_one_text_per_row` was called for this model."""
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
