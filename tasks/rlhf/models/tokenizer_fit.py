"""Compare a tokenizer with the embeddings of the model in the same folder: an id without a row ends a run in mid-stage."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.system.errors import InputError


def fit_to_embeddings(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Refuse tokens that the model in ``folder`` has no embeddings for. Of the pad token another takes the place.

    No result depends on what pads: lengths come from masks.
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
            f"The tokenizer in {folder} has {len(wrong)} tokens without an embedding, first {wrong[0][1]!r} with the id "
            f"{wrong[0][0]}, and the model has {rows} embeddings: give the tokenizer that the model was trained with, or "
            "call model.resize_token_embeddings(len(tokenizer)) and save the model again."
        )
    if pad in outside:
        print(
            f"The pad token {pad!r} of {folder} has no embedding: {tokenizer.eos_token!r} pads instead.",
            flush=True,
        )
        tokenizer.pad_token = tokenizer.eos_token
    if unknown in outside:
        tokenizer.unk_token = None
    if outside and isinstance(
        tokenizer, PreTrainedTokenizerFast
    ):  # or texts that hold them, and saved copies, would
        vars(tokenizer)["_tokenizer"] = _drop_ids_from(tokenizer.backend_tokenizer, rows)


def num_embeddings(folder: Path) -> int | None:
    """Return how many tokens the model in ``folder`` has embeddings for; None if there is no model to ask."""
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
