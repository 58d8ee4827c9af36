"""alignflow: run the pipeline, plan it, serve it, keep it in order. Exit status 0 done, 1 a stage failed, 2 bad input, 130 interrupted."""

import argparse
import atexit
import gc as memory
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from flows import profiles
from flows.services import environment, isolation
from flows.services.processes import ServerFailed
from tasks.artifacts.store import home
from tasks.execution.launch import interruptible
from tasks.system.errors import DiskFailure, InputError, StageFailed, disk_failure, probe_disk

EXAMPLES = """examples:
  alignflow run demo                                     the built-in site, from votes to an aligned model
  alignflow run demo --set ppo.kl_coefficient=0.1        the same, reusing every stage that this does not change
  alignflow run mine.yaml --summary result.json          a profile of your own
  alignflow plan demo --set sft.epochs=3                 what would be built, and why
  alignflow job demo sft work/ && python -m tasks.programs.sft work/

Everything is kept in .alignflow/ in the working directory; ALIGNFLOW_HOME names another place."""


def main(argv: list[str] | None = None) -> int:
    logging.raiseExceptions = False  # a log that cannot be written must not fill the screen with tracebacks
    atexit.register(
        memory.freeze
    )  # runs last: the interpreter need not spend a second on looking through what it is about to forget
    args = _parser().parse_args(argv)
    isolation.leave_out_other_servers(all_of_them=args.call is up)
    warnings.simplefilter("ignore")  # those of libraries; alignflow's own go through events
    try:
        args.call(args)
        return 0
    except InputError as error:
        return _say(str(error), 2)
    except (StageFailed, ServerFailed) as error:
        if isinstance(error, ServerFailed) and (failure := _full_disk()):
            return _say(str(failure), 2)
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say("Interrupted; the same command goes on from where it stopped.", 130)
    except Exception as error:
        if (
            failure := disk_failure(error, home()) or _full_disk()
        ):  # Prefect's server, too, fails on a full disk, and does not say why
            return _say(str(failure), 2)
        return _say(_unexpected(error), 1)


def run(args: argparse.Namespace) -> None:
    from flows.extras import check_packages, check_stages
    from flows.preflight import check_inputs, check_places

    started, root = time.monotonic(), home()
    config = profiles.load(args.profile, args.set)
    check_packages(config)
    check_places(root, args.summary)
    check_inputs(config)
    config = profiles.with_absolute_paths(config, Path.cwd())
    summary_file = args.summary and args.summary.absolute()
    mask = os.umask(0o077)  # the home's files are the user's only; the summary is as the user's other files
    environment.join(root)
    environment.prepare(root)
    check_stages(config)
    from flows.display.terminal import Screen, print_end
    from flows.services.processes import check_prefect, prefect_api

    api = prefect_api(root)
    with Screen() as screen:
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.pipeline import rlhf  # slow to import: the API starts meanwhile
        from tasks.tracking.client import process_tracker

        process_tracker().connect()
        if api:
            api.wait()
        else:
            check_prefect()
        screen.ready()
        with (
            interruptible(),
            temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
        ):  # its thread takes a second to end
            summary: dict[str, Any] = rlhf(config, profile=profiles.title(args.profile))
    summary["seconds"] = round(time.monotonic() - started, 3)
    if summary_file:
        _write_summary(summary_file, summary)
        summary_file.chmod((0o600 if root in summary_file.parents else 0o666) & ~mask)
    print_end(summary)


def plan(args: argparse.Namespace) -> None:
    config = _config(args)
    environment.join(home())
    environment.for_imports()
    from flows.commands.plan import plan as planned
    from flows.display.terminal import print_plan

    print_plan(planned(config))


def report(args: argparse.Namespace) -> None:
    page = home() / "report.html"
    if not page.is_file():
        raise InputError("There is no report yet; `alignflow run demo` makes one")
    print(page)
    if args.open:
        import webbrowser

        webbrowser.open(page.as_uri())


def job(args: argparse.Namespace) -> None:
    # not all inputs need be here: the walk to the stage opens those that it takes
    config = profiles.with_absolute_paths(profiles.load(args.profile, args.set), Path.cwd())
    directory, folder = args.directory.absolute(), Path.cwd()
    environment.for_imports()
    from flows.commands.job import prepare_job

    prepare_job(config, args.stage, directory)
    option = " -P" if isolation.hides_a_module(folder, args.stage) else ""
    print(f"python{option} -m tasks.programs.{args.stage} {args.directory}")


def up(args: argparse.Namespace) -> None:
    from flows.commands.deploy import define
    from flows.extras import check_servers
    from flows.preflight import check_places

    root = home()
    check_places(root, None)
    if args.prefect_port == args.mlflow_port and args.prefect_port:
        raise InputError(
            f"--prefect-port and --mlflow-port are both {args.prefect_port}: two servers need two ports"
        )
    definition = define(args.profile)
    check_servers()
    isolation.reach_loopback_directly()
    environment.prepare(root)
    from flows.commands.up import up as serve

    with suppress(KeyboardInterrupt):
        serve(
            root,
            prefect_port=args.prefect_port,
            mlflow_port=args.mlflow_port,
            definition=definition,
            with_workers=not args.no_workers,
        )


def deploy(args: argparse.Namespace) -> None:
    from flows.commands.deploy import define
    from flows.commands.deploy import deploy as made

    definition = define(args.profile)
    _find_servers()

    names = made(definition, webhook=os.environ.get("ALIGNFLOW_ALERT_WEBHOOK", ""))
    print("\n".join([*names, *(f"left out: {name}: {why}" for name, why in definition.left_out.items())]))


def work(args: argparse.Namespace) -> None:
    _find_servers()
    from flows.commands.work import work as become

    become(args.pool, name=args.name, limit=args.limit)


def landed(args: argparse.Namespace) -> None:
    dump = args.dump.absolute()
    if not dump.exists():
        raise InputError(f"There is no file or folder {args.dump}")
    _find_servers()
    from flows.commands.landed import land

    print(land(profiles.title(args.profile), dump))


def gc(args: argparse.Namespace) -> None:
    environment.join(home())
    environment.for_imports()
    from flows.commands.gc import clean

    clean(home(), keep_runs=args.keep_runs, days=args.days, dry_run=args.dry_run)


def doctor(args: argparse.Namespace) -> None:
    environment.for_imports()
    from flows.commands.doctor import doctor as examined

    if examined(home(), deep=args.deep):
        sys.exit(1)


def _find_servers() -> None:
    environment.join(home())
    if not os.environ.get("PREFECT_API_URL"):
        raise InputError(
            "There is no Prefect server to use: `alignflow up` starts one, PREFECT_API_URL names another"
        )
    environment.prepare(home())
    from flows.services.processes import check_prefect

    check_prefect()


def _config(args: argparse.Namespace) -> Any:
    from flows.preflight import check_inputs

    config = profiles.load(args.profile, args.set)
    check_inputs(config)
    return profiles.with_absolute_paths(config, Path.cwd())


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"alignflow {version('alignflow')}")
        parser.exit()


def _number(read: Callable[[str], Any], least: float, most: float = float("inf")) -> Callable[[str], Any]:
    """Return a reader of numbers between two bounds, for argparse."""

    def number(text: str) -> Any:
        value = read(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"{text} must be {least:g} or more" + (f", {most:g} at most" if most < float("inf") else "")
            )
        return value

    number.__name__ = "number"  # in argparse's own words: invalid number value
    return number


PORT = _number(int, 0, 65535)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="alignflow",
        description="From votes to an aligned language model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="say which version this is")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        call: Callable[[argparse.Namespace], None], text: str, example: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            call.__name__,
            help=text,
            description=text,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(call=call)
        return made

    def profile(made: argparse.ArgumentParser) -> None:
        made.add_argument(
            "profile", metavar="PROFILE", help=f"one of {', '.join(profiles.names())}, or a YAML file"
        )
        made.add_argument(
            "--set",
            metavar="NAME=VALUE",
            action="append",
            default=[],
            help="change one setting; may be repeated",
        )

    running = command(
        run,
        "Run the pipeline; stages that are there already are reused.",
        "alignflow run demo --set seed=1 --summary demo.json",
    )
    profile(running)
    running.add_argument(
        "--summary", metavar="FILE", type=Path, help="write the run's stages and figures as JSON"
    )
    profile(
        command(
            plan,
            "Say which stages would be built or reused, and why.",
            "alignflow plan demo --set ppo.steps=20",
        )
    )
    reporting = command(report, "Say where the last run's report is.", "alignflow report --open")
    reporting.add_argument("--open", action="store_true", help="open it in the browser")
    by_hand = command(
        job, "Write a stage's job.json, to run its program by hand.", "alignflow job demo sft work/"
    )
    profile(by_hand)
    by_hand.add_argument(
        "stage",
        metavar="STAGE",
        help="site, data, pretrain, sft, merge, reward, ppo, reference, dpo, winrate or report",
    )
    by_hand.add_argument(
        "directory", metavar="DIR", type=Path, help="folder to write job.json into; made if needed"
    )
    serving = command(
        up, "Run Prefect, MLflow and workers on this machine until Ctrl-C.", "alignflow up mine.yaml"
    )
    serving.add_argument(
        "profile", metavar="PROFILE", nargs="*", help="a YAML file to deploy beside the built-in profiles"
    )
    serving.add_argument("--prefect-port", type=PORT, default=4200, help="default: %(default)s")
    serving.add_argument("--mlflow-port", type=PORT, default=5000, help="default: %(default)s")
    serving.add_argument(
        "--no-workers", action="store_true", help="servers only; `alignflow work POOL` starts workers"
    )
    deploying = command(
        deploy, "Put deployments, pools and automations on a Prefect server.", "alignflow deploy mine.yaml"
    )
    deploying.add_argument(
        "profile", metavar="PROFILE", nargs="*", help="a YAML file to deploy beside the built-in profiles"
    )
    working = command(
        work,
        "Run the stages or flows of a work pool on this machine.",
        "CUDA_VISIBLE_DEVICES=0 alignflow work gpu",
    )
    working.add_argument(
        "pool", metavar="POOL", help="cpu or gpu, or a pool that a deployed profile names in pools.*"
    )
    working.add_argument("--name", default="", help="default: host, pool and process id")
    working.add_argument(
        "--limit", type=_number(int, 0), default=0, help="runs at a time (default: 4 for cpu, else 1)"
    )
    landing = command(
        landed,
        "Tell the Prefect server that a new dump is there: retraining starts.",
        "alignflow landed mine Posts.xml",
    )
    landing.add_argument("profile", metavar="PROFILE", help="the profile whose retraining is deployed")
    landing.add_argument("dump", metavar="FILE", type=Path, help="a dump that the cpu worker can read")
    cleaning = command(gc, "Free what no registered model and no recent run needs.", "alignflow gc --dry-run")
    cleaning.add_argument("--dry-run", action="store_true", help="only say what would go")
    cleaning.add_argument(
        "--keep-runs",
        metavar="N",
        type=_number(int, 0),
        default=10,
        help="keep what the last N runs need (default: %(default)s)",
    )
    cleaning.add_argument(
        "--days",
        metavar="D",
        type=_number(float, 0),
        default=7.0,
        help="and all that is younger than D days (default: %(default)s)",
    )
    examining = command(
        doctor, "Check this machine, the home and the servers, and say what to do.", "alignflow doctor --deep"
    )
    examining.add_argument("--deep", action="store_true", help="read every stored file")
    return parser


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    from tasks.system.files import replace_text

    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(summary, indent=1) + "\n")


def _say(text: str, status: int) -> int:
    print(f"alignflow: {text}", file=sys.stderr)
    return status


def _full_disk() -> DiskFailure | None:
    """Return what to tell the user if the disk of the home, or of Prefect's database, takes no more."""
    folders = {home(), Path(os.environ.get("PREFECT_HOME", home()))}
    return next(filter(None, (probe_disk(folder) for folder in sorted(folders) if folder.is_dir())), None)


def _unexpected(error: Exception) -> str:
    """One line for what nobody foresaw; the rest goes to a file."""
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
