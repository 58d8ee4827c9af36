"""Create the built-in base model: a small Llama and a byte-level BPE tokenizer, trained from scratch."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PAD, EOS = "<pad>", "<eos>"
# A token may span a path, a file name or an option, but neither the space after it nor a sentence's full
# stop.
_PIECES = r" ?[-/~.]*\w+(?:[./-]+\w+)*| ?[^\s\w]+|\s+"


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer of at most ``vocabulary`` tokens; pad and eos are different tokens."""
    raw = Tokenizer(BPE())
    pieces = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, eos_token=EOS)


def new_llama(
    *,
    vocabulary: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    context: int,
    pad_id: int,
    eos_id: int,
) -> "LlamaForCausalLM":
    """Create a Llama with random weights (torch's global seed), tied embeddings and fp32 parameters."""
    # Their import takes longer than torch's; `alignflow look`, which learns a tokenizer, needs none of it.
    from transformers import LlamaConfig, LlamaForCausalLM

    # The usual 0.02 suits wide models; here it delays copying by hundreds of steps.
    initializer_range = hidden_size**-0.5
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
        initializer_range=initializer_range,
    )
    return LlamaForCausalLM(config)
