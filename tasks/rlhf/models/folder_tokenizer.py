"""Load a folder's tokenizer, fitted to the model beside it: an id without embedding would stop a stage."""

import json
import logging
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from tasks.system.errors import InputError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, without tokens that the model beside it has no embedding for.

    Raises InputError.

    It must have an end token. If it has no pad token of its own the end token pads: lengths always come from
    masks.
    """
    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} has no tokenizer that can be loaded: save one beside the model with "
            "tokenizer.save_pretrained."
        ) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"The tokenizer in {folder} has no end-of-sequence token: set eos_token in its "
            "tokenizer_config.json."
        )
    fit_to_embeddings(tokenizer, folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def quiet_libraries() -> None:
    """Log only errors of the model libraries, without progress bars."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)


def fit_to_embeddings(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise InputError if the model in ``folder`` has no embeddings for some tokens.

    A pad token without one is replaced by the end token (no result depends on it: lengths come from masks),
    and an unknown token without one is removed.
    """
    rows = num_embeddings(folder)
    if rows is None:
        return
    outside = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    pad = str(tokenizer.pad_token) if tokenizer.pad_token_id is not None else None
    unknown = tokenizer.unk_token  # some classes (Qwen 2's) add one, which bytes never need
    spare = {token for token in (pad, unknown) if token is not None}
    if wrong := sorted((i, token) for token, i in outside.items() if token not in spare):
        raise InputError(
            f"The tokenizer in {folder} has {len(wrong)} tokens without an embedding, first {wrong[0][1]!r} "
            "with the id "
            f"{wrong[0][0]}, and the model has {rows} embeddings: give the tokenizer that the model was "
            "trained with, or call model.resize_token_embeddings(len(tokenizer)) and save the model again."
        )
    if pad in outside:
        print(
            f"The pad token {pad!r} of {folder} has no embedding: {tokenizer.eos_token!r} pads instead.",
            flush=True,
        )
        tokenizer.pad_token = tokenizer.eos_token
    if unknown in outside:
        tokenizer.unk_token = None
    if outside and isinstance(tokenizer, PreTrainedTokenizerFast):
        # else texts that contain these tokens, and saved copies of the tokenizer, would still use their ids
        vars(tokenizer)["_tokenizer"] = _drop_ids_from(tokenizer.backend_tokenizer, rows)


def num_embeddings(folder: Path) -> int | None:
    """Return the number of embeddings of the model in ``folder``; None if no configuration can be read."""
    if not (folder / "config.json").is_file():
        return None
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):  # loading the model says what is wrong
        return None
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def _drop_ids_from(tokenizer: Tokenizer, rows: int) -> Tokenizer:
    """Return the tokenizer without the ids from ``rows`` on."""
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["id"] < rows]
    vocabulary = raw["model"]["vocab"]
    if isinstance(vocabulary, dict):
        raw["model"]["vocab"] = {token: i for token, i in vocabulary.items() if i < rows}
    else:
        raw["model"]["vocab"] = vocabulary[:rows]  # Unigram's pieces with their scores
    return Tokenizer.from_str(json.dumps(raw))
