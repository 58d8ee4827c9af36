"""Freeze the labels of a round: what is built on them is built on one file, whatever is labelled later.

The digest of the file is a tag of the round's run in MLflow, and the file is among that run's files: a round
that is resumed anywhere finds the same labels.
"""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.rounds.label_exchange import FOLDER
from tasks.rounds.label_log import Label, format_row, label_folder
from tasks.rounds.label_round import ASKED, FROZEN
from tasks.system.errors import InputError
from tasks.system.files import replace_text
from tasks.system.hashing import file_digest
from tasks.tracking.client import Run, Tracker
from tasks.tracking.runs import MAX_RUNS


def freeze(tracker: Tracker, run_id: str, asked_key: str, labels: Sequence[Label]) -> Artifact:
    """Write the labels to a file that never changes, publish it with the run, and return it as an input."""
    text = "".join(f"{format_row(label)}\n" for label in labels)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path = _path(asked_key, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text)
    tracker.upload(run_id, path, FOLDER)
    tracker.set_tags(run_id, {FROZEN: digest})
    return user_artifact(path)


def find_frozen(tracker: Tracker, asked_key: str) -> Artifact | None:
    """Return the frozen labels of a round's pairs; None if they are not frozen.

    Raises InputError if the file is gone.
    """
    for run in _runs_of(tracker, asked_key):
        if digest := run.tags.get(FROZEN):
            return user_artifact(_fetch(tracker, run.run_id, asked_key, digest))
    return None


def thaw(tracker: Tracker, asked_key: str) -> None:
    """Forget which labels are frozen: the round's next run freezes those that hold then."""
    for run in _runs_of(tracker, asked_key):
        if run.tags.get(FROZEN):
            tracker.set_tags(run.run_id, {FROZEN: ""})


def _runs_of(tracker: Tracker, asked_key: str) -> list[Run]:
    return tracker.search(f"tags.`{ASKED}` = '{asked_key}'", limit=MAX_RUNS)


def _path(asked_key: str, digest: str) -> Path:
    return label_folder(asked_key) / f"frozen-{digest[:12]}.jsonl"


def _fetch(tracker: Tracker, run_id: str, asked_key: str, digest: str) -> Path:
    path = _path(asked_key, digest)
    if path.is_file() and file_digest(path) == digest:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        found = tracker.download(run_id, f"{FOLDER}/{path.name}", Path(temporary))
        if found is None or file_digest(found) != digest:
            raise InputError(
                f"The labels that the round was built on ({path.name}) are neither on this machine nor in "
                "MLflow"
            )
        return found.replace(path)
