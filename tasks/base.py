"""The model that the user brings instead of the built-in base: found, checked, and fetched when it is a hub id."""

from pathlib import Path

from tasks.artifact import Artifact, given
from tasks.hub import fetched, is_hub_id
from tasks.programs.config import HuggingFaceBase, InputError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "spiece.model", "merges.txt", "*.jinja"]


def given_base(base: HuggingFaceBase) -> Artifact:
    """The model folder as an input of stages."""
    return given(model_folder(base))


def model_folder(base: HuggingFaceBase) -> Path:
    """The folder that holds the model; a hub id's safetensors are downloaded first. Raises InputError."""
    folder = Path(base.path).expanduser()
    if not folder.exists():
        if not is_hub_id(base.path):
            raise InputError(f"base.path: there is no model folder {folder}")
        folder = fetched(base.path, "model", revision=base.revision, wanted=WANTED, setting="base.path")
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
