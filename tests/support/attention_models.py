"""Create tiny random models of every kind of attention, with windows much shorter than the texts."""

from collections.abc import Callable

import torch
import transformers as hf
from transformers import PretrainedConfig, PreTrainedModel

from tests.support import tiny

WINDOW, CONTEXT = 12, 128
_IDS = {
    "vocab_size": tiny.VOCABULARY,
    "pad_token_id": tiny.PAD,
    "eos_token_id": tiny.EOS,
    "bos_token_id": tiny.EOS,
}
_SIZES = {
    "hidden_size": tiny.WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    **_IDS,
}
_HALF = {**_SIZES, "num_key_value_heads": 1, "head_dim": 16}
_TWO_KINDS = ["sliding_attention", "full_attention"]
_NO_CAP = {"final_logit_softcapping": None}
_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**_HALF),
    "gpt2": lambda: hf.GPT2Config(n_embd=tiny.WIDTH, n_layer=2, n_head=2, n_positions=CONTEXT, **_IDS),
    "qwen2": lambda: hf.Qwen2Config(**_HALF),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "qwen3": lambda: hf.Qwen3Config(**_HALF),
    "opt": lambda: hf.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=tiny.WIDTH),
    "gptj": lambda: hf.GPTJConfig(
        n_embd=tiny.WIDTH, n_layer=2, n_head=2, rotary_dim=8, n_positions=CONTEXT, **_IDS
    ),
    "falcon": lambda: hf.FalconConfig(**_SIZES, alibi=False),
    "mistral": lambda: hf.MistralConfig(**_HALF, sliding_window=WINDOW),
    "qwen2_windows": lambda: hf.Qwen2Config(
        **_HALF, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3_windows": lambda: hf.Qwen3Config(
        **_HALF, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "gemma2": lambda: hf.Gemma2Config(
        **_HALF, **_NO_CAP, sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=5.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **_HALF, sliding_window=WINDOW, layer_types=_TWO_KINDS, query_pre_attn_scalar=16
    ),
    "phi3": lambda: hf.Phi3Config(**_HALF, sliding_window=WINDOW),
    "phi3_longrope": lambda: hf.Phi3Config(
        **_HALF, sliding_window=WINDOW, rope_parameters=_LONGROPE, original_max_position_embeddings=64
    ),
    "starcoder2": lambda: hf.Starcoder2Config(**_HALF, sliding_window=WINDOW),
    "cohere2": lambda: hf.Cohere2Config(
        **_HALF, sliding_window=WINDOW, layer_types=_TWO_KINDS, logit_scale=1.0
    ),
    "olmo3": lambda: hf.Olmo3Config(**_HALF, sliding_window=WINDOW, layer_types=_TWO_KINDS),
    "gpt_oss": lambda: hf.GptOssConfig(**_HALF, sliding_window=WINDOW, layer_types=_TWO_KINDS, **_EXPERTS),
    "llama4": lambda: hf.Llama4TextConfig(
        **_HALF, **_EXPERTS, attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"]
    ),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        hidden_size=tiny.WIDTH,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=WINDOW,
        max_position_embeddings=CONTEXT,
        **_IDS,
    ),
    "falcon_alibi": lambda: hf.FalconConfig(**_SIZES, alibi=True),
    "bloom": lambda: hf.BloomConfig(hidden_size=tiny.WIDTH, n_layer=2, n_head=2, **_IDS),
    "mpt": lambda: hf.MptConfig(d_model=tiny.WIDTH, n_layers=2, n_heads=2, max_seq_len=CONTEXT, **_IDS),
    "mamba": lambda: hf.MambaConfig(hidden_size=tiny.WIDTH, num_hidden_layers=2, state_size=8, **_IDS),
}


def config(kind: str) -> PretrainedConfig:
    return CONFIGS[kind]()


def model(
    kind: str, *, seed: int = 0, weight_scale: float = 3.0, window: int = WINDOW, context: int = CONTEXT
) -> PreTrainedModel:
    """Return a random model of width 32 and 2 layers, frozen, in eval mode; scaled weights make attention
    matter.
    """
    torch.manual_seed(seed)
    settings = config(kind)
    if window != WINDOW:
        settings.sliding_window = window
    if context != CONTEXT:
        settings.max_position_embeddings = context
    made: PreTrainedModel = hf.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(weight_scale)
    return made.requires_grad_(False).eval()
