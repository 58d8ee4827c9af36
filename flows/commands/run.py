"""`alignflow run`: run the pipeline of a profile in this process."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from flows import profiles
from flows.arguments import add_profile
from flows.failures import RunFailed
from flows.services import environment
from tasks.artifacts.store import home
from tasks.config.pipeline import Pipeline
from tasks.execution.launch import interruptible
from tasks.system.files import replace_text

if TYPE_CHECKING:
    from prefect import Flow

    from flows.display.rounds_screen import RoundsScreen
    from flows.display.terminal import Screen

    Display = tuple[Screen | RoundsScreen, Callable[[dict[str, Any]], None]]

HELP = "Run the pipeline; stages that are there already are reused."
EXAMPLE = "alignflow run demo --set seed=1 --summary demo.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow run`."""
    add_profile(parser)
    parser.add_argument(
        "--summary", metavar="FILE", type=Path, help="write the run's stages and figures as JSON"
    )


def main(args: argparse.Namespace) -> None:
    """Check everything that can be checked, then run the flow. Raises InputError and RunFailed."""
    run_command(args, load_flow, load_display)


def load_flow() -> "Flow[..., Any]":
    """Return the flow of `alignflow run`."""
    from flows.pipeline import rlhf

    return rlhf


def load_display() -> "Display":
    """Return the screen of `alignflow run`, and what prints its summary."""
    from flows.display.terminal import Screen, print_end

    return Screen(), print_end


def run_command(
    args: argparse.Namespace,
    load_flow: "Callable[[], Flow[..., Any]]",
    load_display: "Callable[[], Display]",
    *,
    rounds: bool = False,
) -> None:
    """Check everything that can be checked, run a flow, and write and print its summary.

    ``load_flow`` and ``load_display`` import what only a run needs, which is slow. Raises what ``check``
    raises, and RunFailed after the summary of the run in which a stage failed is printed.
    """
    started = time.monotonic()
    checked = check(args, rounds=rounds)
    from flows.display.terminal import print_end

    screen, print_summary = load_display()
    try:
        summary = run_flow(checked, screen, load_flow)
    except RunFailed as error:
        if error.summary:
            print_end(error.summary)
        raise
    summary["seconds"] = round(time.monotonic() - started, 3)
    write_summary(checked, summary)
    print_summary(summary)


class Checked(NamedTuple):
    """A run that nothing speaks against."""

    config: Pipeline  # with absolute paths
    title: str  # of the profile
    summary_file: Path | None
    mask: int  # the user's umask


def check(args: argparse.Namespace, *, rounds: bool = False) -> Checked:
    """Check everything that can be checked before a flow runs, and set this process up for it.

    ``rounds``: the flow is that of rounds. Raises InputError.
    """
    from flows.extras import check_packages, check_stages
    from flows.preflight import check_environment, check_inputs, check_places, check_rounds

    root, title = home(), profiles.title(args.profile)
    config = profiles.load(args.profile, args.set)
    check_packages(config)
    check_places(root, args.summary)
    check_inputs(config)
    if rounds:
        check_rounds(config)
    config = profiles.with_absolute_paths(config, Path.cwd())
    summary_file = args.summary and args.summary.absolute()
    # the home's files are for the user only; the summary gets the permissions of the user's other files
    mask = os.umask(0o077)
    environment.use_running_servers(root)
    environment.prepare(root)
    check_stages(config, title, rounds=rounds)
    check_environment(config, title, rounds=rounds)
    return Checked(config, title, summary_file, mask)


def run_flow(
    checked: Checked, screen: "Screen | RoundsScreen", load_flow: "Callable[[], Flow[..., Any]]"
) -> dict[str, Any]:
    """Run a flow, with a Prefect server that is started if there is none; return the summary.

    ``load_flow`` imports the flow, which is slow; Prefect's server starts meanwhile.
    """
    from flows.display.terminal import drawing
    from flows.services.processes import check_prefect, start_prefect_api

    api = start_prefect_api(home())
    with drawing(screen):
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from tasks.tracking.client import process_tracker

        flow = load_flow()
        process_tracker().connect()
        if api:
            api.wait()
        else:
            check_prefect()
        screen.ready()
        # the thread of Prefect's own heartbeat takes a second to end
        without_heartbeat = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with interruptible(), without_heartbeat:
            summary = flow(checked.config, profile=checked.title)
    return cast(dict[str, Any], summary)


def write_summary(checked: Checked, summary: dict[str, Any]) -> None:
    """Write the summary into the file that the user has named, if any."""
    path = checked.summary_file
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(summary, indent=1) + "\n")
    path.chmod((0o600 if home() in path.parents else 0o666) & ~checked.mask)
