"""Test rounds of labels: how machines exchange them, what is frozen, and what was built on a label."""

import json
from pathlib import Path
from typing import Any

import pytest

from tasks.promotion.lineage import load_graph
from tasks.rounds.frozen_labels import find_frozen, freeze, thaw
from tasks.rounds.label_exchange import fetch_labels, publish_labels
from tasks.rounds.label_lineage import trace_labels
from tasks.rounds.label_log import append_rows, label_folder, new_label, read_labels, withdraw
from tasks.rounds.label_round import find_round, read_asked
from tasks.rounds.label_rows import read_file, write_file
from tasks.system.errors import InputError
from tasks.tracking import runs
from tasks.tracking.client import Tracker
from tests.tasks.rounds.made_rounds import make_artifact, make_pairs, make_round


def other_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go on as another machine, which shares only MLflow."""
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()


def test_two_machines_exchange_labels_and_withdrawals(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_round(tracker, make_pairs(2))
    mine = new_label("0" * 32, "first", "Ann")
    append_rows(label_folder(one.key), [mine])
    publish_labels(tracker, one)
    other_home(tmp_path, monkeypatch)
    assert read_asked(tracker, one.key) == make_pairs(2)
    theirs = new_label(f"{1:032x}", "tie", "Ben")
    append_rows(label_folder(one.key), [theirs])
    assert fetch_labels(tracker, one) == [mine, theirs]
    withdraw(label_folder(one.key), [mine], why="a mistake", by="Ben")
    publish_labels(tracker, one)
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    assert read_labels(label_folder(one.key)) == [mine]
    assert fetch_labels(tracker, one) == [theirs]


def test_frozen_labels_are_the_same_after_more_labels_on_another_machine_until_they_are_thawed(
    tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_round(tracker, make_pairs(2))
    assert find_frozen(tracker, one.key) is None
    label = new_label("0" * 32, "first", "Ann")
    frozen = freeze(tracker, one.run_ids[0], one.key, [label])
    append_rows(label_folder(one.key), [label, new_label(f"{1:032x}", "tie", "Ann")])
    make_round(tracker, make_pairs(2))  # the command was started again: another run of the same round
    other_home(tmp_path, monkeypatch)
    found = find_frozen(tracker, one.key)
    assert found is not None
    assert found["digest"] == frozen["digest"]
    assert str(tmp_path / "other") in found["path"]
    assert find_round(tracker).frozen == frozen["digest"]
    thaw(tracker, one.key)
    assert find_frozen(tracker, one.key) is None


def test_a_round_is_found_by_profile_run_and_key_and_a_waiting_one_comes_first(tracker: Tracker) -> None:
    old = make_round(tracker, make_pairs(1), seed=1)
    new = make_round(tracker, make_pairs(1), seed=2)
    assert find_round(tracker).key == find_round(tracker, "rounds").key == new.key
    freeze(tracker, new.run_ids[0], new.key, [])
    assert find_round(tracker, "rounds").key == old.key
    for name in (new.run_ids[0], new.key[:8], "rounds 2"):
        assert find_round(tracker, name).key == new.key
    with pytest.raises(InputError, match="There is no round that 'demo' names"):
        find_round(tracker, "demo")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_exported_labels_are_imported_as_they_were(tmp_path: Path, suffix: str) -> None:
    pairs = make_pairs(3)
    labels = [new_label(pairs[0]["pair_id"], "first", "Ann", seconds=2.5, shown_first="second")]
    assert write_file(tmp_path / f"labels.{suffix}", labels, pairs) == 1
    assert read_file(tmp_path / f"labels.{suffix}", pairs) == labels


def test_a_row_with_texts_may_have_the_answers_the_other_way_round(tmp_path: Path) -> None:
    pair = make_pairs(1)[0]
    row = {"prompt": pair["prompt"], "first": pair["second"], "second": pair["first"], "rater": " Ann "}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row | {"verdict": "first"}) + "\n" + json.dumps(row | {"verdict": "tie"}))
    found = read_file(path, [pair])
    assert [(one.verdict, one.rater) for one in found] == [("second", "Ann"), ("tie", "Ann")]


KNOWN = {"pair_id": "0" * 32, "verdict": "first", "rater": "Ann"}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            KNOWN | {"pair_id": "f" * 32},
            "1 of 2 rows of .* are of no pair of this round: nothing is imported",
        ),
        (
            KNOWN | {"verdict": "left"},
            "Row 2 of .* has the verdict 'left': it must be one of first, second, tie",
        ),
        (KNOWN | {"rater": ""}, "Row 2 of .*: A rater's name is 1 to 60 printable characters, not ''"),
        (KNOWN | {"seconds": "soon"}, "Row 2 of .*: could not convert"),
    ],
)
def test_a_bad_row_is_refused_with_one_sentence(tmp_path: Path, row: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(KNOWN)}\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=sentence):
        read_file(path, make_pairs(1))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", b"[1]\n", r"Line 1 of .*rows\.jsonl is no JSON object: '\[1\]'"),
        ("rows.jsonl", b"{\n", r"Line 1 of .*rows\.jsonl is no JSON object: '\{'"),
        ("rows.jsonl", b"\xff", r"rows\.jsonl cannot be read: "),
        ("rows.parquet", b"no parquet", r"rows\.parquet cannot be read as parquet: "),
        ("rows.jsonl", None, r"rows\.jsonl cannot be read: .*No such file"),
        ("rows.parquet", None, r"rows\.parquet cannot be read as parquet: "),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        read_file(tmp_path / name, make_pairs(1))


def test_withdrawn_rows_are_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(KNOWN | {'withdrawn': True})}\n{json.dumps(KNOWN | {'rater': 'Ben'})}\n")
    assert [one.rater for one in read_file(path, make_pairs(1))] == ["Ben"]


def test_everything_that_was_built_on_a_label_is_found(tracker: Tracker) -> None:
    with runs.pipeline_run(tracker, "rounds", {}, profile="rounds") as tracked:
        parent = str(tracked.run_id)
        keys: dict[str, list[str]] = {"mine": [], "others": []}
        for seed, (who, label) in enumerate([("mine", "label 1"), ("others", "label 2")]):
            digest = ""
            for stage in ("comparisons", "mixture", "reward", "ppo"):
                table = {"labels": [{"label_id": label}]} if stage == "comparisons" else {}
                inputs = {"taken": digest} if digest else {}
                made = make_artifact(tracker, stage, seed, table, parent=parent, origins=inputs)
                digest = made["digest"]
                keys[who].append(made["key"])
        gone = make_artifact(tracker, "comparisons", 2, {}, parent=parent)  # has no table of labels any more
    found = trace_labels(tracker, load_graph(tracker), {"label 1"})
    assert {one["comparisons"]["key"] for one in found} == {keys["mine"][0], gone["key"]}
    found.sort(key=lambda one: one["is_searched"], reverse=True)
    assert [(one["is_searched"], one["labels"]) for one in found] == [(True, ["label 1"]), (False, [])]
    assert {one["key"] for one in found[0]["learnt"]} == set(keys["mine"][2:])
    assert {one["key"] for one in found[0]["derived"]} == set(keys["mine"][:2])
