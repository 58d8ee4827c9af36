"""Loading a base model and its tokenizer, and making the small built-in one."""

import logging
import platform
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from tasks.rlhf.batches.forward import hidden_states, output_head
from tasks.rlhf.models import tokenizer_fit
from tasks.rlhf.models.quantised import (
    ADAPTER,
    Precision,
    Stored,
    dense_weight,
    mismatched_weights,
    quantisation_config,
    quantised_layers,
    use_exact_products,
)
from tasks.system.errors import InputError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, with no token that the model beside it has no embedding for. Raises InputError.

    It must have an end token; if it has no pad token of its own the end token pads, and lengths always come from masks.
    """
    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} has no tokenizer that can be loaded: save one beside the model with tokenizer.save_pretrained."
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer in {folder} has no end-of-sequence token: set eos_token in its tokenizer_config.json."
        )
    tokenizer_fit.fit_to_embeddings(tokenizer, folder)
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
    switch = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return switch if isinstance(switch, int) else None


def check_head(model: PreTrainedModel) -> None:
    """Logits must be the output head's value of the last hidden states: refuse architectures that scale or cap them afterwards."""
    probe = torch.arange(1, 9, device=model.device)[None] % model.config.vocab_size
    with torch.no_grad():
        gap = (
            (model(probe, use_cache=False).logits - output_head(model)(hidden_states(model, probe)))
            .abs()
            .max()
            .item()
        )
        gap = max(gap, _change_of_logits(model, probe))
    if gap > 1e-3:
        raise InputError(
            f"{model.config.model_type} models change their logits after the output head (by {gap:.3g}): they are not supported."
        )


def _change_of_logits(model: PreTrainedModel, probe: Tensor) -> float:
    """Return by how much the model changes logits of up to 100; a cap at 30 would hardly show in those of small weights."""
    planted = torch.linspace(
        -100, 100, model.config.get_text_config().vocab_size, device=model.device, dtype=model.dtype
    )
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


def load(
    folder: Path, *, device: torch.device, precision: Precision | Stored | None = None
) -> PreTrainedModel:
    """A causal language model from a Hugging Face folder: safetensors, no remote code, eval mode, frozen. None keeps the stored type."""
    quiet_libraries()
    settings: dict[str, Any] = {
        "dtype": getattr(torch, precision) if precision in ("float32", "bfloat16", "float16") else "auto"
    }
    if precision in ("int8", "nf4"):
        settings |= {"quantization_config": quantisation_config(precision), "device_map": {"": device}}
        if folder_dtype(folder) == torch.float16:
            settings["dtype"] = torch.bfloat16  # small gradients vanish in float16
    try:
        if hasattr(load_config(folder), "quantization_config"):
            raise InputError(
                f"{folder} is quantised already: give the folder of the model that it was made from, and the precision to load it in."
            )
        guards = {
            "use_safetensors": True,
            "trust_remote_code": False,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **guards, **settings)
    except ImportError as error:
        raise InputError(
            f"A base in {precision} needs other versions of bitsandbytes and accelerate: pip install 'alignflow[gpu]'."
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} cannot be loaded as a causal language model in safetensors format: {str(error).splitlines()[0]}"
        ) from error
    model: PreTrainedModel = loaded[0]
    wrong = {
        *loaded[1]["missing_keys"],
        *(key for key, *_ in loaded[1]["mismatched_keys"]),
        *mismatched_weights(model),
    }  # they would stay random
    if wrong:
        raise InputError(
            f"{folder} lacks {len(wrong)} tensors of its model or has them in another shape, first {min(wrong)}: save the model again."
        )
    model.requires_grad_(False)
    nn.Module.to(model, device)
    model.eval()
    _upcast_on_slow_cpu(model, device)
    use_exact_products(model)
    return model


def _upcast_on_slow_cpu(model: PreTrainedModel, device: torch.device) -> None:
    """Let a CPU without instructions for bfloat16 compute with the same weights in float32; `stored` still tells of their type."""
    if model.dtype == torch.bfloat16 and device.type == "cpu" and not has_fast_bfloat16():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.bfloat16:
                tensor.data = tensor.data.float()


def has_fast_bfloat16() -> bool:
    """Whether this CPU has instructions for it. Without them a product takes four times as long as in float32 (measured: 32 and 123 GFLOPS)."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return platform.machine().lower() not in ("x86_64", "amd64") or any(
        getattr(torch.cpu, name, lambda: True)() for name in asked
    )


def folder_dtype(folder: Path) -> torch.dtype:
    """The type of the weights in a model folder."""
    return getattr(load_config(folder), "dtype", None) or torch.float32


def load_config(folder: Path) -> PretrainedConfig:
    """A model folder's configuration. Raises InputError."""
    if (
        folder / ADAPTER
    ).exists():  # transformers would load the base that the adapter names, and the adapter over it
        raise InputError(
            f"{folder} holds an adapter ({ADAPTER}): merge it into its base first (peft's merge_and_unload, save_pretrained) and give "
            "that folder, or move the adapter's files away."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} cannot be loaded as a causal language model in safetensors format: {str(error).splitlines()[0]}"
        ) from error
    return config


def stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """The type in which the weights came, or were asked for, whatever this machine computes in."""
    dtype = model.config.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def precision_of(model: PreTrainedModel) -> str:
    """int8, nf4, or the type of the weights."""
    kinds = {type(layer).__name__ for _, layer in quantised_layers(model)}
    assert len(kinds) < 2
    return (
        {"Linear8bitLt": "int8", "Linear4bit": "nf4"}[kinds.pop()]
        if kinds
        else str(stored_dtype(model)).removeprefix("torch.")
    )


def load_dequantised(
    folder: Path, *, device: torch.device, precision: Precision | Stored | None, dtype: Stored | None = None
) -> PreTrainedModel:
    """The folder's model in ``dtype`` (None: the stored type) with the weights that it has in ``precision``: what to merge an adapter into.

    An adapter has learnt to mend the rounding of the base that it was trained on. Measured on a 260k model after 60 steps on nf4, as largest and mean
    difference of logits to the adapter on its base: merged into these weights 1e-4 and 5e-6 in float32, 0.7 and 0.07 in bfloat16; into
    the folder's own 14 and 1.0 in either.
    """
    model = load(folder, device=device, precision=dtype)
    if precision not in ("int8", "nf4"):
        return model
    layers = dict(model.named_modules())
    for name, quantised in quantised_layers(load(folder, device=device, precision=precision)):
        layer = layers[name]
        assert isinstance(layer.weight, Tensor)
        layer.weight.copy_(
            dense_weight(quantised).T if isinstance(layer, Conv1D) else dense_weight(quantised)
        )  # GPT-2 keeps its matrices the other way round
    return model
