"""`alignflow export`: write a policy into a folder, for other programs."""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from flows.commands.usage import named_policies
from flows.commands.usage.named_policies import HELP_MODELS
from tasks.config.commands.usage import ExportJob
from tasks.promotion import finished_policies
from tasks.promotion.finished_policies import Source
from tasks.system.errors import InputError

HELP = "Write a policy into a folder: merged, as an adapter, or as GGUF."
EXAMPLE = "alignflow export champion policy/"
CONVERTER = "convert_hf_to_gguf.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow export`."""
    parser.add_argument("model", metavar="MODEL", help=HELP_MODELS)
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new folder")
    parser.add_argument(
        "--as",
        dest="form",
        choices=("merged", "adapter", "gguf"),
        default="merged",
        help="one model with tokenizer, chat template and generation config; the adapter alone in PEFT's "
        "format; or a GGUF file (default: %(default)s)",
    )
    parser.add_argument(
        "--base",
        metavar="NAME",
        default="",
        help="with --as adapter: hub id or folder that the adapter names as its base (default: where "
        "the base is on this machine)",
    )
    parser.add_argument(
        "--llama-cpp", metavar="FOLDER", type=Path, help="with --as gguf: a checkout of llama.cpp"
    )


def main(args: argparse.Namespace) -> None:
    """Write the folder and print where it is. Raises InputError."""
    from tasks.execution.foreground import check_new_folder

    target = args.directory.absolute()
    check_new_folder(target)
    if args.base and args.form != "adapter":
        raise InputError("--base goes with --as adapter")
    converter = find_converter(args.llama_cpp) if args.form == "gguf" else ""
    source = named_policies.find_source(args.model)
    policy, base_name = named_policies.locate(source), args.base
    if args.form == "adapter":
        if isinstance(source, Path):
            raise InputError(f"{source} is a whole model, not an adapter: --as merged writes it")
        adapter, base = finished_policies.adapter_files(named_policies.tracker(), source)
        policy, base_name = policy.model_copy(update={"tuned": str(adapter)}), base_name or base
    job = ExportJob(policy=policy, form=args.form, base_name=base_name, converter=converter)
    with tempfile.TemporaryDirectory() as folder:
        card = None
        if isinstance(source, Source):
            card = finished_policies.fetch_card(named_policies.tracker(), source, Path(folder))
        write_folder("export", job, target, {"card": card} if card else {})
    print(target)


def write_folder(program: str, job: ExportJob, target: Path, inputs: dict[str, Path]) -> None:
    """Let a program write a new folder. Raises InputError."""
    from tasks.execution.foreground import new_folder, run_in_foreground

    with new_folder(target) as folder:
        run_in_foreground(program, job, folder, inputs)


def find_converter(checkout: Path | None) -> str:
    """Return the path of llama.cpp's converter. Raises InputError if it is missing."""
    if checkout is None:
        found = shutil.which(CONVERTER)
    else:
        place = Path(os.path.abspath(checkout.expanduser())) / CONVERTER
        found = str(place) if place.is_file() else None
    if found is None:
        raise InputError(
            f"GGUF is written by llama.cpp's {CONVERTER}, which is not part of a package: clone "
            "https://github.com/ggml-org/llama.cpp and name the checkout with --llama-cpp"
        )
    return found
