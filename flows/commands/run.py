"""`alignflow run`: run the pipeline of a profile in this process."""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, cast

from flows import profiles
from flows.arguments import add_profile
from flows.failures import RunFailed
from flows.services import environment
from tasks.artifacts.store import home
from tasks.execution.launch import interruptible
from tasks.system.files import replace_text

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
    from flows.extras import check_packages, check_stages
    from flows.preflight import check_environment, check_inputs, check_places

    started, root = time.monotonic(), home()
    config = profiles.load(args.profile, args.set)
    check_packages(config)
    check_places(root, args.summary)
    check_inputs(config)
    config = profiles.with_absolute_paths(config, Path.cwd())
    summary_file = args.summary and args.summary.absolute()
    # the home's files are for the user only; the summary gets the permissions of the user's other files
    mask = os.umask(0o077)
    environment.use_running_servers(root)
    environment.prepare(root)
    check_stages(config, profiles.title(args.profile))
    check_environment(config, profiles.title(args.profile))
    from flows.display.terminal import print_end

    try:
        summary = _run_flow(root, config, profiles.title(args.profile))
    except RunFailed as error:
        if error.summary:
            print_end(error.summary)
        raise
    summary["seconds"] = round(time.monotonic() - started, 3)
    if summary_file:
        _write_summary(summary_file, summary)
        summary_file.chmod((0o600 if root in summary_file.parents else 0o666) & ~mask)
    print_end(summary)


def _run_flow(root: Path, config: Any, title: str) -> dict[str, Any]:
    """Run the flow rlhf, with a Prefect server that is started if there is none; return the summary."""
    from flows.display.terminal import Screen
    from flows.services.processes import check_prefect, start_prefect_api

    api = start_prefect_api(root)
    with Screen() as screen:
        from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

        from flows.pipeline import rlhf  # slow to import; Prefect's server starts meanwhile
        from tasks.tracking.client import process_tracker

        process_tracker().connect()
        if api:
            api.wait()
        else:
            check_prefect()
        screen.ready()
        # the thread of Prefect's own heartbeat takes a second to end
        without_heartbeat = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with interruptible(), without_heartbeat:
            summary = rlhf(config, profile=title)
    return cast(dict[str, Any], summary)


def _write_summary(path: Path, summary: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(summary, indent=1) + "\n")
