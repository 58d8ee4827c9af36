"""The model that the user brings instead of the built-in base: found, checked, and fetched when it is a hub id."""

import re
from pathlib import Path

from tasks.artifact import Artifact, given
from tasks.programs.config import HuggingFaceBase, InputError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "spiece.model", "merges.txt", "*.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def given_base(base: HuggingFaceBase) -> Artifact:
    """The model folder as an input of stages."""
    return given(model_folder(base))


def model_folder(base: HuggingFaceBase) -> Path:
    """The folder that holds the model; a hub id's safetensors are downloaded first. Raises InputError."""
    folder = Path(base.path).expanduser()
    if not folder.exists():
        if base.path.startswith(".") or not HUB_ID.fullmatch(base.path):
            raise InputError(f"base.path: there is no model folder {folder}")
        folder = _fetched(base)
    check_model_folder(folder)
    return folder


def check_model_folder(folder: Path) -> None:
    """Refuse what transformers could not load, before anything runs."""
    if not folder.is_dir():
        raise InputError(f"base.path: {folder} is not a folder; name the folder that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise InputError(f"base.path: the model folder {folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"base.path: the model folder {folder} has no .safetensors weights; other formats are not loaded")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise InputError(f"base.path: the model folder {folder} has no tokenizer (tokenizer.json or tokenizer.model)")


def _fetched(base: HuggingFaceBase) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base.path, revision=base.revision, allow_patterns=WANTED))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"base.path: {base.path} is neither a folder here nor a model that could be fetched ({reason})") from error
