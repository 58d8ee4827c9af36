"""`alignflow export-data`: write a run's data in TRL's formats."""

import argparse
from pathlib import Path

from flows.commands.usage import named_policies
from tasks.config.commands.usage import ExportDataJob
from tasks.promotion import finished_policies
from tasks.rounds.round_runs import find_policy_run
from tasks.tracking.remote_artifacts import locate

HELP = "Write a run's data in TRL's formats: SFT, preferences, prompts."
EXAMPLE = "alignflow export-data trl/ --format jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow export-data`."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new folder")
    parser.add_argument("--run", metavar="RUN", default="", help="id or name of a run (default: the newest)")
    parser.add_argument(
        "--format", choices=("parquet", "jsonl"), default="parquet", help="default: %(default)s"
    )


def main(args: argparse.Namespace) -> None:
    """Write the folder and print where it is. Raises InputError."""
    from tasks.execution.foreground import check_new_folder, new_folder, run_in_foreground

    target = args.directory.absolute()
    check_new_folder(target)
    tracker = named_policies.tracker()
    source = finished_policies.of_run(find_policy_run(tracker, args.run), "sft")
    data = locate(finished_policies.find_data(tracker, source), tracker)
    text = finished_policies.text_settings(tracker, source)
    job = ExportDataJob(text=text, form=args.format, about=source.about.partition(" of ")[2])
    with new_folder(target) as folder:
        run_in_foreground("export_data", job, folder, {"data": data})
    print(target)
