"""Find the policies that a user names, connecting to MLflow only if a name needs that."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from flows.extras import check_training
from flows.preflight import require_tracker
from tasks.config.commands.usage import PolicyFiles
from tasks.promotion import finished_policies
from tasks.promotion.finished_policies import Source
from tasks.rounds.round_runs import find_policy_run
from tasks.tracking.client import Tracker

HELP_MODELS = finished_policies.NAMES


@cache
def tracker() -> Tracker:
    """Return the connection to MLflow. Raises InputError."""
    return require_tracker()


def find_source(name: str) -> Source | Path:
    """Return what a name means. Raises InputError."""
    check_training("Using a policy")
    return finished_policies.find_sources([name], tracker, find_policy_run)[0]


def locate(source: Source | Path) -> PolicyFiles:
    """Return a policy with its files on this machine. Raises InputError."""
    if isinstance(source, Path):
        return finished_policies.folder_files(source)
    return finished_policies.policy_files(tracker(), source)


def locate_policies(names: Sequence[str]) -> list[PolicyFiles]:
    """Return the policies with these names, by default those of the newest run, or of the last round that
    won. Raises InputError.
    """
    check_training("Using a policy")
    if names:
        found = finished_policies.find_sources(names, tracker, find_policy_run)
        return [locate(source) for source in found]
    run = find_policy_run(tracker())
    return [locate(finished_policies.of_run(run, name)) for name in finished_policies.trained_names(run)]
