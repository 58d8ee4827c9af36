"""`alignflow promote`: judge the policy of a finished run by the gates and make it the champion."""

import argparse

from flows import profiles
from flows.failures import NotPromoted
from flows.preflight import require_tracker
from tasks.config.sections.gates import Promotion
from tasks.promotion import promotion as steps
from tasks.promotion.finished_runs import FinishedRun
from tasks.rounds.round_runs import choose_run
from tasks.system.errors import InputError
from tasks.tracking.run_origin import user_name

HELP = "Make a run's policy the champion if it passes the gates."
EXAMPLE = "alignflow promote --set promotion.gates.kl=5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `alignflow promote`."""
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        default="",
        help="id or name of a run (default: the newest; of rounds, the last one that won)",
    )
    parser.add_argument(
        "--yes",
        action="store_true",
        help="decide for it, if a person has to decide",
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="change one setting of the run's promotion; may be repeated",
    )


def main(args: argparse.Namespace) -> None:
    """Print the evidence and what became of the policy. Raises InputError, and NotPromoted if it fails."""
    changed = _check_settings(args.set)
    tracker = require_tracker()
    run, reason = choose_run(tracker, args.run)
    promotion = _promotion(run, changed)
    proposal = steps.propose(tracker, promotion, run)
    from flows.display.registry_tables import print_evidence

    if reason:
        print(reason)
    if not proposal.is_champion:
        print_evidence(proposal)
    by_person = args.yes or promotion.approval == "person"
    ending = steps.challenge(tracker, proposal, by_person=by_person)
    if ending.outcome == "Refused":
        raise NotPromoted(ending.sentence)
    if ending.outcome == "Challenger" and (promotion.approval == "automatic" or args.yes):
        ending = steps.promote(tracker, proposal, by=user_name() if args.yes else "the gates")
    if ending.outcome == "Challenger":
        command = f"alignflow promote {proposal.run.run_id} --yes"
        print(f"{ending.sentence} A person decides: `{command}` makes it the champion.")
    else:
        print(ending.sentence)


def _check_settings(settings: list[str]) -> list[str]:
    for setting in settings:
        if not setting.strip().startswith("promotion."):
            raise InputError(f"A finished run's settings are fixed but for promotion.*, not {setting!r}")
    return settings


def _promotion(run: FinishedRun, changed: list[str]) -> Promotion:
    """Return the settings that the run was started with, and what the user has changed."""
    return profiles.change("promotion", run.settings.get("promotion", {}), changed).promotion
