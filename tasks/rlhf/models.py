"""Loading a base model and its tokenizer, and making the small built-in one."""

import logging
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from tasks.rlhf import attention_masks, tokenizer_fit
from tasks.rlhf.refusal import InputError

PAD, EOS = "<pad>", "<eos>"
# A token may span a path, a file name or an option, but neither the space behind it nor a sentence's full stop.
_PIECES = r" ?[-/~.]*\w+(?:[./-]+\w+)*| ?[^\s\w]+|\s+"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most ``vocabulary`` tokens; pad and eos are different tokens."""
    raw = Tokenizer(BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS)


def new_llama(*, vocabulary: int, hidden_size: int, num_layers: int, num_heads: int, context: int, pad_id: int, eos_id: int) -> LlamaForCausalLM:
    """A Llama with random weights (torch's global seed), tied embeddings and fp32 parameters."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 8) * 8,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=context,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        bos_token_id=eos_id,
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5,  # the usual 0.02 suits wide models; here it delays copying by hundreds of steps
    )
    return LlamaForCausalLM(config)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, with no token that the model beside it has no embedding for. Raises InputError.

    It must have an end token; if it has no pad token of its own the end token pads, and lengths always come from masks.
    """
    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} has no tokenizer that can be loaded: save one beside the model with tokenizer.save_pretrained.") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer in {folder} has no end-of-sequence token: set eos_token in its tokenizer_config.json.")
    tokenizer_fit.fit(tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_context(model: PreTrainedModel, num_tokens: int) -> None:
    """Refuse texts for which the model has no positions.

    Blocks of packed texts may be longer: positions begin anew with every text, and padding has none that no text has.
    """
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len"):  # the latter is MPT's
        limit = getattr(config, name, None)
        if isinstance(limit, int) and num_tokens > limit:
            raise InputError(
                f"text.max_prompt_tokens + text.max_answer_tokens is {num_tokens}, but this model reads {limit} tokens at most: lower them to fit."
            )
    switch = _longrope_switch(config)
    if switch is not None and num_tokens > switch:
        raise InputError(
            f"text.max_prompt_tokens + text.max_answer_tokens is {num_tokens}, but this model (rope type longrope) computes "
            f"all texts of a batch in another way if one has more than {switch} tokens: lower them to fit."
        )


def _longrope_switch(config: PretrainedConfig) -> int | None:
    """Return from how many tokens on longrope takes its other frequencies, for the whole batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    switch = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return switch if isinstance(switch, int) else None


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor | None = None, visible: Tensor | None = None) -> Tensor:
    """Last hidden states (B, T, D) of ids (B, T).

    ``visible`` (B, T, T) bool says which places each place may see; layers with a window see those inside it. Without
    it attention is the model's own, which keeps padding on the right out, and if ``position_ids`` start anew in a row
    so does attention.
    """
    mask = None
    if visible is None and position_ids is not None:
        if attention_masks.are_texts_apart(model):
            texts = _places_of_documents(position_ids)
            together = isinstance(model, FSDPModule)  # its ranks must call it equally often
            found = attention_masks.compute_apart(partial(hidden_states, model), input_ids, texts, in_one_call=together)
            return found.view(*input_ids.shape, -1)
        if model.config._attn_implementation in ("sdpa", "eager"):
            visible = _own_documents(position_ids)  # one mask for all layers; transformers makes one in each of them
    if visible is not None:
        mask = attention_masks.build(model, visible, position_ids)
    told = {} if position_ids is None else {"position_ids": position_ids}  # not every model can be told positions
    decoder = attention_masks.decoder(model)
    output: Tensor = decoder(input_ids=input_ids, attention_mask=mask, use_cache=False, **told).last_hidden_state
    return output


def _places_of_documents(position_ids: Tensor) -> list[list[int]]:
    """Places of each document, counted through the rows (B, T); documents begin where ``position_ids`` are 0."""
    starts = [*torch.where(position_ids.flatten() == 0)[0].tolist(), position_ids.numel()]
    return [list(range(start, end)) for start, end in pairwise(starts)]


def _own_documents(position_ids: Tensor) -> Tensor:
    """Which places each place sees of its own document up to itself, (B, T, T) bool; documents begin where ``position_ids`` (B, T) are 0."""
    document = (position_ids == 0).cumsum(dim=1)
    return (document[:, :, None] == document[:, None, :]).tril()


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer from hidden states to logits."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head


def check_head(model: PreTrainedModel) -> None:
    """Logits must be the output head's value of the last hidden states: refuse architectures that scale or cap them afterwards."""
    probe = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        gap = (model(probe, use_cache=False).logits - output_head(model)(hidden_states(model, probe))).abs().max().item()
        gap = max(gap, _change_of_logits(model, probe))
    if gap > 1e-3:
        raise InputError(f"{model.config.model_type} models change their logits after the output head (by {gap:.3g}): they are not supported.")


def _change_of_logits(model: PreTrainedModel, probe: Tensor) -> float:
    """Return by how much the model changes logits of up to 100; a cap at 30 would hardly show in those of small weights."""
    planted = torch.linspace(-100, 100, model.config.get_text_config().vocab_size, device=model.device, dtype=model.dtype)
    planted = planted.expand(*probe.shape, -1)
    hook = output_head(model).register_forward_hook(lambda *_: planted.clone())
    try:
        logits: Tensor = model(probe, use_cache=False).logits
    finally:
        hook.remove()
    return (logits - planted).abs().max().item()


def quiet_libraries() -> None:
    """Only errors of the model libraries reach the log, and no progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
