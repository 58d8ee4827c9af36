"""alignflow: run the pipeline, plan it, serve it, maintain it. Each command is a file in flows/commands.

Exit status: 0 done, 1 a stage failed or a gate refused, 2 bad input, 3 people must label first, 130
interrupted.
"""

import argparse
import atexit
import gc as garbage_collector
import logging
import os
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn, Protocol

from flows.commands import deploy, doctor, gc, job, landed, plan, report, rounds, run, up, work
from flows.commands.labelling import label, labels
from flows.commands.registry import compare, lineage, models, promote, rollback
from flows.commands.usage import chat, export, export_data, look, serve
from flows.failures import NotPromoted, RunFailed
from flows.labelling.labels_needed import LabelsNeeded
from flows.services import isolation
from flows.services.processes import ServerFailed
from tasks.artifacts.store import home
from tasks.config.sections.base import RenamedSetting
from tasks.system.errors import DiskFailure, InputError, StageFailed, disk_failure, probe_disk

EXAMPLES = """examples:
  alignflow run demo                                the built-in site, from votes to an aligned model
  alignflow run demo --set ppo.kl_coefficient=0.2   the same, reusing every stage that this does not change
  alignflow run mine.yaml --summary result.json     a profile of your own
  alignflow plan demo --set sft.epochs=3            what would be built, and why
  alignflow job demo sft work/ && python -m tasks.programs.sft work/

Everything is kept in .alignflow/ in the working directory; ALIGNFLOW_HOME names another place."""


class Command(Protocol):
    """A module of flows/commands; the command has the module's name."""

    __name__: str
    HELP: str
    EXAMPLE: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def main(self, args: argparse.Namespace) -> None: ...


COMMANDS: tuple[Command, ...] = (
    run, rounds, label, labels, plan, look, report, job,
    compare, promote, rollback, models, lineage,
    chat, serve, export, export_data,
    up, deploy, work, landed, gc, doctor,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; return the exit status."""
    logging.raiseExceptions = False  # a log that cannot be written must not fill the screen with tracebacks
    # runs last: without it, the interpreter spends a second on collecting objects before it exits
    atexit.register(garbage_collector.freeze)
    args = _parser().parse_args(argv)
    isolation.leave_out_other_servers(all_of_them=args.main is up.main)
    _print_renamed_settings()
    try:
        args.main(args)
        return 0
    except InputError as error:
        return _print_error(str(error), 2)
    except (RunFailed, LabelsNeeded) as error:
        return _print_error(str(error), error.status)
    except (StageFailed, ServerFailed, NotPromoted) as error:
        if isinstance(error, ServerFailed) and (failure := _full_disk()):
            return _print_error(str(failure), 2)
        return _print_error(str(error), 1)
    except KeyboardInterrupt:
        return _print_error("Interrupted; the same command goes on from where it stopped.", 130)
    except Exception as error:
        # Prefect's server, too, fails on a full disk, and does not say why
        if failure := disk_failure(error, home()) or _full_disk():
            return _print_error(str(failure), 2)
        return _print_error(_log_unexpected(error), 1)


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Version(argparse.Action):
    """Print the version, which is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"alignflow {version('alignflow')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="alignflow",
        description="From votes to an aligned language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="say which version this is")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        added = commands.add_parser(
            command.__name__.rpartition(".")[2].replace("_", "-"),
            help=command.HELP,
            description=command.HELP,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.set_defaults(main=command.main)
    return parser


def _print_renamed_settings() -> None:
    """Print one line for each setting with its old name; hide the warnings of libraries.

    alignflow's own warnings are events (tasks.system.events), which the screen shows.
    """
    printed = set[str]()

    def print_once(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in printed:
            printed.add(str(message))
            print(f"alignflow: {message}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", RenamedSetting)
    warnings.showwarning = print_once


def _print_error(text: str, status: int) -> int:
    print(f"alignflow: {text}", file=sys.stderr)
    return status


def _full_disk() -> DiskFailure | None:
    """Return the error to show if the disk of the home, or of Prefect's database, is full."""
    folders = {home(), Path(os.environ.get("PREFECT_HOME", home()))}
    return next(filter(None, (probe_disk(folder) for folder in sorted(folders) if folder.is_dir())), None)


def _log_unexpected(error: Exception) -> str:
    """Write an unexpected error's traceback to a file in the home; return one line about it."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    try:
        log = home() / "logs" / "alignflow.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(
                f"{time.strftime('%F %T')} pid {os.getpid()}\n{''.join(traceback.format_exception(error))}\n"
            )
        return f"{reason} (details: {log})"
    except OSError:
        return reason


if __name__ == "__main__":
    sys.exit(main())
