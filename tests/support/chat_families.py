"""Create small tokenizers like those of the public families: special tokens, chat templates and
normalisation. Some templates write the date: `set_day` sets transformers' clock.
"""

import datetime
import json
from typing import NamedTuple

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE, Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|"
    "im_end|>\\n' }}{% endif %}" + CHATML
)
# Qwen3: an answer without thoughts has an empty thinking block, and thoughts in answers are cut off
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\\n\\n</think>\\n\\n' + m.content.split('</think>')[-1].lstrip('\\n') }}{% else %}{{ "
    "m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% "
    "endif %}"
)
REASONING = (  # DeepSeek R1: the generation prompt opens a thinking block that no rendered answer has
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must "
    "alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>"
    "\\n\\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST]' + m['content'] + "
    "'[/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
HARMONY = (  # gpt-oss: an answer stands in a channel that the generation prompt leaves open
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|"
    "end|>' }}{% else %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ "
    "'ASSISTANT: ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BARE = (  # the end of a turn is left to the tokenizer
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}{% if "
    "add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}<assistant>"
# Templates that write the date as the families do.
DATED = {
    "Llama 3.2": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
        "{%- endif %}{%- endif %}{{ 'Today Date: ' + date_string + '\\n' }}" + LLAMA3
    ),
    "SmolLM3": '\n {%- set today = strftime_now("%d %B %Y") -%}\n{{ "Today Date: " ~ today }}' + TURNS,
    "gpt-oss": (
        "{%- macro system() -%}{{ 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n' }}{%- endmacro -%}\n"
        "{{ system() }}" + TURNS
    ),
    "a variable": "\n  {% set form = '%-d.%-m.%y %A' %}{{ strftime_now(form) }}\n" + TURNS,
}


class Family(NamedTuple):
    template: str
    model: str  # byte-level, sentencepiece (BPE with bytes) or unigram
    special: tuple[str, ...]
    eos: str
    end: str  # what ends an assistant's turn
    bos: str | None = None
    added: tuple[str, ...] = ()  # added tokens that are not special
    exact: bool = (
        True  # whether prompt and answer are the tokens of the whole conversation as transformers has them
    )


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOLS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
SP = ("<unk>", "<s>", "</s>")
FAMILIES = {
    "chatml": Family(CHATML, "byte-level", IM, "<|im_end|>", "<|im_end|>"),
    "qwen2.5-base": Family(QWEN25, "byte-level", IM, "<|endoftext|>", "<|im_end|>", added=TOOLS),
    "qwen3": Family(
        THINKING, "byte-level", IM, "<|im_end|>", "<|im_end|>", added=(*TOOLS, "<think>", "</think>")
    ),
    "deepseek-r1": Family(
        REASONING,
        "byte-level",
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
        exact=False,
    ),
    "gemma": Family(
        GEMMA,
        "sentencepiece",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "<end_of_turn>",
        bos="<bos>",
        added=("\n\n", "  ", "<table>"),
    ),
    "llama3": Family(
        LLAMA3,
        "byte-level",
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "<|eot_id|>",
        bos="<|begin_of_text|>",
    ),
    "llama2": Family(LLAMA2, "sentencepiece", SP, "</s>", "</s>", bos="<s>"),
    "mistral": Family(
        MISTRAL, "sentencepiece", (*SP, "[INST]", "[/INST]", "[TOOL_CALLS]"), "</s>", "</s>", bos="<s>"
    ),
    "phi3": Family(
        PHI3,
        "sentencepiece",
        (*SP, "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "<|end|>",
        bos="<s>",
    ),
    "zephyr": Family(ZEPHYR, "sentencepiece", SP, "</s>", "</s>", bos="<s>"),
    "gpt-oss": Family(
        HARMONY,
        "byte-level",
        (
            "<|startoftext|>",
            "<|endoftext|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|return|>",
        ),
        "<|endoftext|>",
        "<|return|>",
    ),
    "vicuna": Family(VICUNA, "sentencepiece", SP, "</s>", "</s>", bos="<s>"),
    "unigram": Family(
        CHATML, "unigram", ("<unk>", "</s>", "<|im_start|>", "<|im_end|>"), "</s>", "<|im_end|>"
    ),
    "bare": Family(
        BARE,
        "byte-level",
        ("<|endoftext|>",),
        "<|endoftext|>",
        "<|endoftext|>",
        added=("<|user|>", "<|assistant|>"),
        exact=False,
    ),
}

WORDS = (
    "How do I list files? Use `ls -l`. I think the old town. What is this and that? def mean(values): "
    "return 1\n\nfiles folders\n"
)


def family_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a family, with its own vocabulary."""
    family = FAMILIES[name]
    raw = {"byte-level": _byte_level, "sentencepiece": _sentencepiece, "unigram": _unigram}[family.model](
        family
    )
    raw.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in family.special])
    raw.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.added])
    if family.bos:
        raw.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, raw.token_to_id(family.bos))]
        )
    known = {"unk_token": "<unk>"} if "<unk>" in family.special else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=family.eos, bos_token=family.bos, pad_token=family.special[0], **known
    )
    made.chat_template = family.template
    return made


def _byte_level(family: Family) -> Tokenizer:
    raw = Tokenizer(BPE())
    pieces = Regex(
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # as Llama 3 and Qwen have it
    split = pre_tokenizers.Split(pieces, behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([WORDS] * 4, trainer)
    return raw


def _sentencepiece(family: Family) -> Tokenizer:
    """Return BPE on whole texts: ▁ for spaces, bytes for unknown text, a space before the first word
    (except Gemma).
    """
    raw = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    raw.normalizer = (
        spaces if family.template == GEMMA else normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    )
    raw.train_from_iterator(WORDS.splitlines() * 4, trainers.BpeTrainer(vocab_size=100, show_progress=False))
    learnt = json.loads(raw.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), *learnt["vocab"]]
    merges = [tuple(pair) for pair in learnt["merges"]]
    raw.model = BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def _unigram(family: Family) -> Tokenizer:
    """Return a Unigram model with NFKC, whose control tokens are ordinary pieces and therefore harder to
    split.
    """
    pieces = [("<unk>", 0.0), *((text, -1.0) for text in family.special if text != "<unk>")]
    pieces += [(character, -5.0) for character in map(chr, range(33, 127))] + [
        ("▁", -4.0),
        ("\n", -5.0),
        ("▁files", -3.0),
        ("▁the", -3.0),
    ]
    raw = Tokenizer(Unigram(pieces, unk_id=0))
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    raw.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return raw


def set_day(patch: pytest.MonkeyPatch, day: datetime.datetime) -> None:
    """Let it be another day for the chat templates."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> "Clock":
            return cls(day.year, day.month, day.day, tzinfo=tz)

    patch.setattr(chat_template_utils, "datetime", Clock)
