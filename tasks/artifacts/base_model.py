"""Find, check and download the model that the user brings instead of the built-in base."""

import json
from pathlib import Path
from typing import Any

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.artifacts.hub import download, is_hub_id
from tasks.config.sections.models import HuggingFaceBase
from tasks.system.errors import InputError

ADAPTER = "adapter_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
SETTINGS = ["*.json", "tokenizer.model", "spiece.model", "merges.txt", "*.jinja"]  # and the tokenizer


def base_artifact(base: HuggingFaceBase) -> Artifact:
    """Return the model folder as an input of stages. Raises InputError."""
    return user_artifact(find_model_folder(base))


def find_model_folder(base: HuggingFaceBase) -> Path:
    """Return the folder that holds the model; download it first if it is a hub id. Raises InputError."""
    folder = _find_folder(base, WEIGHTS + SETTINGS, [])
    check_model_folder(folder)
    return folder


def find_tokenizer_folder(base: HuggingFaceBase) -> Path:
    """Return a folder that holds the model's tokenizer; weights are not downloaded. Raises InputError."""
    folder = _find_folder(base, SETTINGS, WEIGHTS)
    check_model_folder(folder, has_weights=False)
    return folder


def _find_folder(base: HuggingFaceBase, wanted: list[str], unwanted: list[str]) -> Path:
    folder = Path(base.path).expanduser()
    if folder.exists():
        return folder
    if not is_hub_id(base.path):
        raise InputError(f"base.path: there is no model folder {folder}")
    return download(
        base.path, "model", revision=base.revision, wanted=wanted, unwanted=unwanted, setting="base.path"
    )


def check_model_folder(folder: Path, *, setting: str = "base.path", has_weights: bool = True) -> None:
    """Refuse a folder that transformers could not load, before anything runs. Raises InputError.

    Without ``has_weights`` it is only to load the tokenizer.
    """
    if not folder.is_dir():
        raise InputError(
            f"{setting}: {folder} is not a folder; name the folder that holds config.json and the weights"
        )
    if (folder / ADAPTER).exists():
        raise InputError(
            f"{setting}: {folder} holds an adapter ({ADAPTER}), which transformers would load over weights "
            "that the adapter names: "
            "merge it into its base first (peft's merge_and_unload, save_pretrained) and give that folder, "
            "or move the adapter's files away"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"{setting}: the model folder {folder} has no config.json")
    if has_weights and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{setting}: the model folder {folder} has no .safetensors weights; other formats are not loaded"
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(
            f"{setting}: the model folder {folder} has no tokenizer (tokenizer.json or tokenizer.model)"
        )
    _check_tokenizer(folder, setting)


def _check_tokenizer(folder: Path, setting: str) -> None:
    """Refuse a tokenizer with tokens that the model has no embeddings for. Raises InputError.

    The pad token may lack one: it is replaced when the tokenizer is loaded.
    """
    config = _read(folder / "config.json")
    rows = config.get("vocab_size") or _dictionary(config.get("text_config")).get("vocab_size")
    if not isinstance(
        rows, int
    ):  # transformers has a default for this kind of model; programs compare with it
        return
    names = [value for name in ("pad_token", "unk_token") for value in _settings(folder, name)]
    pads = {
        _dictionary(some).get("content", some)
        for some in names
        if isinstance(some, str) or "content" in _dictionary(some)
    }
    wrong = sorted((i, token) for token, i in _tokens(folder).items() if i >= rows and token not in pads)
    if wrong:
        raise InputError(
            f"{setting}: the tokenizer in {folder} has {len(wrong)} tokens without an embedding, first "
            f"{wrong[0][1]!r} with the id {wrong[0][0]}, and the model has {rows} embeddings: give the "
            "tokenizer that the model was trained with, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )


def _tokens(folder: Path) -> dict[str, int]:
    """Return the ids of all tokens that JSON files list."""
    raw = _read(folder / "tokenizer.json")
    vocabulary = _dictionary(raw.get("model")).get("vocab")
    if isinstance(vocabulary, list):  # a Unigram model: pieces with their scores
        vocabulary = {piece[0]: i for i, piece in enumerate(vocabulary) if isinstance(piece, list) and piece}
    added = raw.get("added_tokens")
    entries = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    found: dict[Any, Any] = {**_dictionary(vocabulary)}
    found |= {token.get("content"): token.get("id") for token in entries}
    for file in ("vocab.json", "added_tokens.json"):
        found |= {} if raw and file == "vocab.json" else _read(folder / file)
    return {token: i for token, i in found.items() if isinstance(token, str) and type(i) is int}


def _settings(folder: Path, name: str) -> list[Any]:
    """Return a setting's value in each of the tokenizer's two files of settings; None if it is not there."""
    return [_read(folder / file).get(name) for file in ("tokenizer_config.json", "special_tokens_map.json")]


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; an empty one if the file does not exist. Raises InputError."""
    if not path.is_file():
        return {}
    try:
        return _dictionary(json.loads(path.read_bytes()))
    except ValueError as error:
        raise InputError(f"base.path: {path} is not JSON ({error}): fetch it again") from error


def _dictionary(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
