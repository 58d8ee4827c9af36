"""Test what `alignflow labels` refuses, and that nothing is changed then."""

import argparse
import json
from pathlib import Path

import pytest

from flows.commands.labelling.labels import finish_labels, import_labels
from tasks.rounds.frozen_labels import freeze
from tasks.rounds.label_exchange import fetch_labels
from tasks.rounds.label_log import label_folder, read_labels
from tasks.rounds.label_round import find_round
from tasks.system.errors import InputError
from tasks.tracking.client import Tracker
from tests.tasks.rounds.made_rounds import make_pairs, make_round


def write_rows(path: Path, *verdicts: str) -> argparse.Namespace:
    """Write a file of labels of the first pairs; return the arguments that import it."""
    rows = [
        {"pair_id": f"{number:032x}", "verdict": one, "rater": "Ann"} for number, one in enumerate(verdicts)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return argparse.Namespace(file=path, by="Ann")


def test_of_a_file_with_a_bad_row_nothing_is_imported(tracker: Tracker, tmp_path: Path) -> None:
    one = make_round(tracker, make_pairs(2))
    with pytest.raises(InputError, match=r"Row 2 of .* has the verdict 'better'"):
        import_labels(write_rows(tmp_path / "rows.jsonl", "first", "better"), tracker, one, [])
    with pytest.raises(InputError, match=r"1 of 3 rows of .* are of no pair of this round"):
        import_labels(write_rows(tmp_path / "rows.jsonl", "first", "tie", "tie"), tracker, one, [])
    assert read_labels(label_folder(one.key)) == []
    import_labels(write_rows(tmp_path / "rows.jsonl", "first"), tracker, one, [])
    assert [label.verdict for label in fetch_labels(tracker, one)] == ["first"]


def test_a_round_that_has_gone_on_takes_no_labels(tracker: Tracker, tmp_path: Path) -> None:
    one = make_round(tracker, make_pairs(2))
    freeze(tracker, one.run_ids[0], one.key, [])
    args = write_rows(tmp_path / "rows.jsonl", "first")
    gone_on = find_round(tracker, one.key)
    for action in (import_labels, finish_labels):
        with pytest.raises(InputError, match="round 1 of rounds has gone on with the labels that it had"):
            action(args, tracker, gone_on, [])
    assert read_labels(label_folder(one.key)) == []


def test_a_round_is_not_finished_with_too_few_labels(tracker: Tracker, tmp_path: Path) -> None:
    one = make_round(tracker, make_pairs(2), least=2)
    args = write_rows(tmp_path / "rows.jsonl", "first", "skip")
    import_labels(args, tracker, one, [])
    with pytest.raises(InputError, match=r"has labels of 1 pairs, and rounds\.labels\.least is 2"):
        finish_labels(args, tracker, one, fetch_labels(tracker, one))
    assert not find_round(tracker, one.key).enough
