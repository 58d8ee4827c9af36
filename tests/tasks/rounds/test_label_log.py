"""Test the log of labels: torn lines, two writers, withdrawing."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from tasks.programs.rounds.label_rows import VERDICTS as PROGRAM_VERDICTS
from tasks.programs.rounds.label_rows import LabelRow, read_label_file
from tasks.programs.rounds.round_tables import LABEL
from tasks.rounds.label_log import (
    LOG,
    VERDICTS,
    Label,
    add_missing_rows,
    append_rows,
    count_labelled,
    new_label,
    read_labels,
    read_rows,
    withdraw,
)
from tasks.system.errors import InputError

A, B = "a" * 32, "b" * 32


def test_a_torn_last_line_is_no_label_and_is_cut_off_by_the_next_writer(tmp_path: Path) -> None:
    first, second = new_label(A, "first", "Ann"), new_label(B, "tie", "Ann", seconds=1.5)
    append_rows(tmp_path, [first])
    with (tmp_path / LOG).open("a") as file:
        file.write('{"label_id": "x", "pai')
    assert read_labels(tmp_path) == [first]
    append_rows(tmp_path, [second])
    assert read_rows(tmp_path / LOG) == [first, second]


def test_a_line_that_is_no_label_is_named(tmp_path: Path) -> None:
    append_rows(tmp_path, [new_label(A, "first", "Ann")])
    with (tmp_path / LOG).open("a") as file:
        file.write('{"label_id": "x"}\n')
    with pytest.raises(InputError, match=r"Line 2 of .*labels\.jsonl is no label"):
        read_labels(tmp_path)


def _write(folder: Path, rater: str) -> None:
    """Append labels in short and slow writes, between which the other process writes if there is no lock."""
    write = os.write

    def write_slowly(descriptor: int, data: bytes) -> int:
        time.sleep(0.001)
        return write(descriptor, data[:40])

    os.write = write_slowly  # type: ignore[assignment]
    for _ in range(50):
        append_rows(folder, [new_label(A, "skip", rater)])


def test_two_writers_lose_no_row(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write, args=(tmp_path, name)) for name in ("Ann", "Ben")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(row.rater for row in read_labels(tmp_path)) == ["Ann"] * 50 + ["Ben"] * 50


def test_a_withdrawn_label_does_not_hold_but_stays_in_the_log(tmp_path: Path) -> None:
    labels = [new_label(A, "first", "Ann"), new_label(B, "skip", "Ann")]
    append_rows(tmp_path, labels)
    withdraw(tmp_path, labels[:1], why="clicked too fast", by="Cat")
    assert read_labels(tmp_path) == labels[1:]
    row = read_rows(tmp_path / LOG)[-1]
    assert (row.label_id, row.withdrawn, row.why, row.rater) == (
        labels[0].label_id,
        True,
        "clicked too fast",
        "Cat",
    )
    assert add_missing_rows(tmp_path, [*labels, row]) == []  # a union with another machine's log
    assert read_labels(tmp_path) == labels[1:]


def test_skipped_pairs_count_where_it_is_asked_whether_all_were_seen() -> None:
    labels = [new_label(A, "first", "Ann"), new_label(A, "tie", "Ben"), new_label(B, "skip", "Ann")]
    assert count_labelled(labels, [A, B], with_skipped=True) == 2
    assert count_labelled(labels, [A, B], with_skipped=False) == 1
    assert count_labelled(labels, [B], with_skipped=False) == 0


def test_the_stage_that_decides_pairs_reads_the_log_as_it_is(tmp_path: Path) -> None:
    assert Label._fields == (*LABEL,) == LabelRow._fields
    assert VERDICTS == PROGRAM_VERDICTS
    labels = [
        new_label(A, "both_bad", "Ann", seconds=2.5, shown_first="second"),
        new_label(B, "first", "Ben"),
    ]
    append_rows(tmp_path, labels)
    withdraw(tmp_path, labels[1:], why="a mistake", by="Ben")
    found, num_others = read_label_file(tmp_path / LOG, [{"pair_id": A}, {"pair_id": B}], source="people")
    assert ([tuple(one) for one in found], num_others) == ([tuple(labels[0])], 0)
