"""`alignflow serve`: answer requests in the OpenAI protocol with transformers' own server."""

import argparse
import re
import shutil
import sys
from pathlib import Path

from flows.arguments import number
from flows.commands.usage import named_policies
from flows.commands.usage.export import write_folder
from flows.commands.usage.named_policies import HELP_MODELS
from flows.extras import check_serving
from tasks.artifacts.store import home
from tasks.config.commands.usage import ExportJob
from tasks.promotion import finished_policies
from tasks.system.errors import StageFailed
from tasks.system.files import replace_text
from tasks.system.hashing import digest_of
from tasks.system.locks import acquire

HELP = "Serve a policy in the OpenAI protocol, with transformers' own server."
EXAMPLE = "alignflow serve champion"
SCHEMA = 1  # of what is kept in the home's exports/
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow serve`."""
    parser.add_argument("model", metavar="MODEL", help=HELP_MODELS)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=number(int, 1, 65535), default=8000, help="default: %(default)s")


def main(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises InputError, and StageFailed if the server ends by itself."""
    check_serving()
    source = named_policies.find_source(args.model)
    name = re.sub(r"[^\w.-]+", "-", source.name).strip("-.")
    cache = export_once(source, name)
    if args.host not in LOOPBACK:
        print(f"The server has no login: everyone who reaches {args.host} can use it.", file=sys.stderr)
    print(f"Serving {name} at http://{args.host}:{args.port}/v1 until Ctrl-C.", flush=True)
    from tasks.execution.foreground import INTERRUPTED, wait_in_foreground

    options = ["--host", args.host, "--port", str(args.port)]
    status = wait_in_foreground(
        ["transformers.cli.transformers", "serve", name, *options],
        environment={"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    if status and status not in INTERRUPTED:
        raise StageFailed(f"The server has ended with the exit status {status}")


def export_once(source: finished_policies.Source | Path, name: str) -> Path:
    """Return a folder in the format of Hugging Face's cache that holds the policy under its name.

    It is made once for the same policy, in the home's exports/. Raises InputError.
    """
    content = finished_policies.content_of(source)
    digest = digest_of({"schema": SCHEMA, "name": name, "content": content})
    cache = home() / "exports" / digest
    model, revision = cache / f"models--{name}", digest[:40]
    with acquire(home() / "locks" / f"export-{digest[:16]}.lock"):
        if not (model / "refs" / "main").is_file():  # written last
            shutil.rmtree(cache, ignore_errors=True)
            job = ExportJob(policy=named_policies.locate(source), form="merged")
            write_folder("export", job, model / "snapshots" / revision, {})
            (model / "refs").mkdir()
            replace_text(model / "refs" / "main", revision)
    cache.touch()
    return cache
