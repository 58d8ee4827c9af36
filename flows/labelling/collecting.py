"""Collect the labels of a round: from the user's file, or from people, whom the flow run waits for.

A flow run of a deployment is suspended meanwhile: it holds no worker, and begins again from the store when it
is resumed, by the event that all labels are in or by a person in Prefect's pages. A command ends instead.
"""

from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.runtime import deployment, flow_run

from flows.labelling.labels_needed import LabelsNeeded
from tasks.artifacts.artifact import Artifact, unbuilt_artifact, user_artifact
from tasks.config.pipeline import Pipeline
from tasks.config.rounds import PeopleLabels
from tasks.rounds.frozen_labels import find_frozen, freeze
from tasks.rounds.label_exchange import fetch_labels
from tasks.rounds.label_log import count_labelled
from tasks.rounds.label_round import find_round, open_round, read_asked
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tasks.tracking.runs import WAITS
from tasks.tracking.tracked_run import TrackedRun

HOUR_SECONDS = 3600


def find_labels(config: Pipeline, tracker: Tracker, asked: Artifact) -> Artifact | None:
    """Return the file of labels that a run of the round would build on, without waiting for any.

    None if the stage comparisons asks a labeller itself; without a digest if people have yet to label, or
    the pairs are not known yet.
    """
    labels = config.rounds.labels
    match labels.kind:
        case "file":
            return user_artifact(labels.path)
        case "people":
            found = find_frozen(tracker, asked["key"]) if asked["digest"] and tracker.connect() else None
            return found or unbuilt_artifact("labels")
    return None


def collect_labels(
    config: Pipeline, profile: str, number: int, asked: Artifact, tracked: TrackedRun
) -> Artifact | None:
    """Return the file of labels of the round's pairs; None if the stage comparisons asks a labeller itself.

    ``asked`` is built, and ``tracked`` is the round's run in MLflow. Labels of people are frozen the first
    time that there are enough: a round that is resumed is built on the same ones. Raises InputError,
    LabelsNeeded, and Prefect's Pause.
    """
    labels = config.rounds.labels
    match labels.kind:
        case "file":
            return user_artifact(labels.path)
        case "people":
            if not tracked.is_on:
                raise InputError(
                    "People's labels are kept in MLflow, which is not reachable; `alignflow doctor` says more"
                )
            found = find_frozen(tracked.tracker, asked["key"])
            return found or _collect(labels, profile, number, asked, tracked)
    return None


def _collect(
    labels: PeopleLabels, profile: str, number: int, asked: Artifact, tracked: TrackedRun
) -> Artifact:
    """Freeze the labels if there are enough; else wait for them, and freeze those that there are then."""
    tracker, key, is_deployed = tracked.tracker, asked["key"], bool(deployment.name)
    waiting_run = str(flow_run.id) if is_deployed else ""
    open_round(tracked, key, number=number, flow_run=waiting_run, overlap=labels.overlap, least=labels.least)
    one = find_round(tracker, key)
    pairs = [str(pair["pair_id"]) for pair in read_asked(tracker, key)]
    held = fetch_labels(tracker, one)
    if count_labelled(held, pairs, with_skipped=True) < len(pairs) and not one.enough:
        missing = len(pairs) - count_labelled(held, pairs, with_skipped=True)
        _wait(labels, f"{missing:,} of {len(pairs):,} pairs of {one.title} wait for labels", key, profile)
    decided, least = count_labelled(held, pairs, with_skipped=False), min(labels.least, len(pairs))
    if decided < least:
        raise InputError(
            f"{one.title} has labels of {decided:,} pairs, and rounds.labels.least is {labels.least:,}: "
            f"`alignflow label {profile}`, then Retry, or the same command"
        )
    return freeze(tracker, str(tracked.run_id), key, held)


def _wait(labels: PeopleLabels, what: str, key: str, profile: str) -> None:
    """Suspend the flow run; return at once if that was done before, and it was resumed.

    Raises Prefect's Pause, which ends the process, and LabelsNeeded if the run is of no deployment and cannot
    be suspended.
    """
    if not deployment.name:
        needed = LabelsNeeded(f"{what}: `alignflow label {profile}`, then the same command goes on")
        needed.add_note(WAITS)
        raise needed
    try:
        # Without a form: the event resumes the run without an answer, which a form would miss (3.9.1).
        suspend_flow_run(timeout=int(labels.timeout_hours * HOUR_SECONDS), key=f"labels {key[:12]}")
    except Pause as pause:
        pause.add_note(WAITS)
        raise
