"""Exchange a round's labels between machines: MLflow has the log of each of the round's runs."""

import tempfile
from pathlib import Path

from tasks.rounds.label_log import LOG, Label, add_missing_rows, label_folder, read_labels, read_rows
from tasks.rounds.label_round import LabelRound
from tasks.tracking.client import Tracker

FOLDER = "labels"  # among the files of a run


def fetch_labels(tracker: Tracker, one: LabelRound) -> list[Label]:
    """Add what other machines have published to the log of this one, and return the labels that hold."""
    folder = label_folder(one.key)
    folder.mkdir(parents=True, exist_ok=True)
    for run_id in one.run_ids:
        with tempfile.TemporaryDirectory() as temporary:
            if path := tracker.download(run_id, f"{FOLDER}/{LOG}", Path(temporary)):
                add_missing_rows(folder, read_rows(path))
    return read_labels(folder)


def publish_labels(tracker: Tracker, one: LabelRound) -> None:
    """Publish the log of this machine, with what other machines have published meanwhile.

    If two machines publish at the same moment, the log of one replaces that of the other, which has its rows
    still, and publishes them the next time.
    """
    fetch_labels(tracker, one)
    log = label_folder(one.key) / LOG
    if log.is_file():
        tracker.upload(one.run_ids[0], log, FOLDER)
