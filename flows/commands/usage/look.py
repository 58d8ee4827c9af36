"""`alignflow look`: show examples of a source as the model will see them, before anything is trained."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from flows import profiles
from flows.arguments import number
from tasks.artifacts.base_model import find_tokenizer_folder
from tasks.artifacts.corpus import find_corpus
from tasks.artifacts.hub import is_hub_id
from tasks.config.commands.usage import LookJob
from tasks.config.pipeline import Pipeline
from tasks.config.sections.models import BuiltinBase, HuggingFaceBase
from tasks.config.sections.sources import ShellSite
from tasks.system.errors import InputError

HELP = "Show examples as the model will see them: tokens, loss mask, what is cut."
EXAMPLE = "alignflow look rows.jsonl --model MODEL_FOLDER"
LIMITS = {"max_prompt_tokens": 1024, "max_answer_tokens": 1024}  # of rows that no profile belongs to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow look`."""
    names = ", ".join(profiles.names())
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help=f"a profile ({names}, or a YAML file), a file or folder of rows, or the id of a data set on the "
        "Hugging Face hub",
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        type=Path,
        help="a folder with a tokenizer (default: the profile's model; a tokenizer that is learnt from the "
        "texts if it has none)",
    )
    parser.add_argument(
        "--count", type=number(int, 1, 1000), default=3, help="examples (default: %(default)s)"
    )
    parser.add_argument(
        "--set", metavar="NAME=VALUE", action="append", default=[], help="change one setting; may be repeated"
    )


def main(args: argparse.Namespace) -> None:
    """Print the examples. Raises InputError."""
    config = read_settings(args.source, args.model, args.set)
    config = profiles.with_absolute_paths(config, Path.cwd())
    from tasks.execution.foreground import run_in_foreground

    inputs = {}
    if not isinstance(config.source, ShellSite):
        inputs["source"] = find_corpus(config.source)
    if folder := find_tokenizer(config, args.model):
        inputs["tokenizer"] = folder
    vocabulary = config.base.vocabulary if isinstance(config.base, BuiltinBase) else BuiltinBase().vocabulary
    job = LookJob(
        seed=config.seed,
        source=config.source,
        data=config.data,
        text=config.text,
        loss_on=config.sft.loss_on,
        vocabulary=vocabulary,
        count=args.count,
    )
    with tempfile.TemporaryDirectory(prefix="alignflow-look-") as folder_name:
        run_in_foreground("look", job, Path(folder_name), inputs)


def read_settings(source: str, model: Path | None, settings: list[str]) -> Pipeline:
    """Return the settings of a profile, or those of a file of rows of the user's own. Raises InputError."""
    if is_profile(source):
        return profiles.load(source, settings)
    place = Path(source).expanduser()
    if not place.exists() and not ("/" in source and is_hub_id(source)):
        near = profiles.hint(source, profiles.names())
        raise InputError(f"There is no profile, file or folder {source!r}{near}")
    known: dict[str, Any] = {"kind": "own", "path": str(place) if place.exists() else source}
    text: dict[str, Any] = dict(LIMITS)
    if model and has_chat_template(model):
        text["template"] = "chat"
    return profiles.over_defaults({"source": known, "text": text}, settings)


def is_profile(source: str) -> bool:
    """Return whether a name is a profile's: a built-in one, or a YAML file."""
    return source.endswith((".yaml", ".yml")) or source in profiles.names()


def has_chat_template(folder: Path) -> bool:
    """Return whether a tokenizer's folder has a chat template."""
    settings = folder / "tokenizer_config.json"
    named = settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")
    return named or (folder / "chat_template.jinja").is_file()


def find_tokenizer(config: Pipeline, model: Path | None) -> Path | None:
    """Return the folder of the tokenizer; None if it is still to be learnt. Raises InputError."""
    if model:
        if not model.is_dir():
            raise InputError(f"--model: there is no folder {model}")
        return model.absolute()
    return find_tokenizer_folder(config.base) if isinstance(config.base, HuggingFaceBase) else None
