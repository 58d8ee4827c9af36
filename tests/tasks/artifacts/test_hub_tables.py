"""Test the part of a data set in the hub's layout that `datasets` fetches."""

import json
import os
import random
import resource
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.artifacts import hub_tables
from tasks.artifacts.artifact import user_artifact
from tasks.artifacts.corpus import find_corpus
from tasks.config.sections.sources import HhRlhf, OwnRows
from tasks.dataset.readers.quarantine import Quarantine
from tasks.dataset.readers.row_files import read_rows
from tasks.dataset.splits import is_test
from tasks.system.errors import DiskFailure, InputError

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: other
  data_files:
  - {split: train, path: other/*}
---
"""


@pytest.fixture(autouse=True)
def _offline_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a data set of two configs: 5 + 5 + 2 rows for training and 1 for testing, and 3 of the other."""
    place = tmp_path / "set"
    write_rows(place / "data/train-00000.parquet", range(5))
    write_rows(place / "data/train-00001.parquet", range(5, 10))
    write_rows(place / "data/test-00000.parquet", range(90, 91))
    write_rows(place / "other/part.parquet", range(20, 23))
    write_rows(place / "other/eval.parquet", range(30, 32))
    (place / "README.md").write_text(CARD)
    return place


def write_rows(path: Path, numbers: range) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"q{n}", "completion": f"a{n}", "extra": n} for n in numbers]
    pq.write_table(pa.Table.from_pylist(rows), path)


def read(path: Path, **settings: Any) -> list[tuple[str, int, str]]:
    """Return (file, row, prompt) of every row that the reader of rows finds."""
    found = find_corpus(OwnRows(path=str(path), **settings))
    rows = read_rows(found, Quarantine())
    return [(row.place.file, row.place.row, row.fields["prompt"]) for row in rows]


def test_a_split_is_read_with_the_file_and_row_of_each_row(folder: Path) -> None:
    found = read(folder, config="main", split="train")
    assert found[:2] == [
        ("train/data/train-00000.parquet", 1, "q0"),
        ("train/data/train-00000.parquet", 2, "q1"),
    ]
    assert [prompt for _, _, prompt in found] == [f"q{n}" for n in range(10)]


def test_take_reads_the_first_rows_of_each_split(folder: Path) -> None:
    assert [prompt for *_, prompt in read(folder, config="main", take=7)] == [
        "q90", *(f"q{n}" for n in range(7)),
    ]  # fmt: skip


def test_columns_that_are_not_named_are_left_out(folder: Path) -> None:
    source = OwnRows(path=str(folder), config="other", columns=("prompt", "completion"))
    (file, *_) = sorted(find_corpus(source).rglob("*.parquet"))
    assert pq.read_schema(file).names == ["prompt", "completion"]


def test_files_and_splits_that_are_named_as_test_sets_stay_so(folder: Path) -> None:
    places = {(file, is_test(file)) for file, *_ in read(folder, config="main")}
    assert {test for file, test in places if file.startswith("test/")} == {True}
    assert {test for file, test in places if file.startswith("train/")} == {False}
    other = {file: is_test(file) for file, *_ in read(folder, config="other")}
    assert other == {"train/other/eval.parquet": True, "train/other/part.parquet": False}


def test_rows_in_json_lines_are_read_and_other_shapes_refused(tmp_path: Path) -> None:
    place = tmp_path / "lines"
    (place / "data").mkdir(parents=True)
    (place / "data/train-0.jsonl").write_text('{"prompt": "a", "x": "y"}\n{"prompt": "b", "z": 1}\n')
    (place / "data/train-1.jsonl").write_text('{"prompt": "c", "x": "y"}\n')
    assert read(place, split="train") == [
        ("train/data/train-0.jsonl.parquet", 1, "a"),
        ("train/data/train-0.jsonl.parquet", 2, "b"),
        ("train/data/train-1.jsonl.parquet", 1, "c"),
    ]
    (place / "data/train-1.jsonl").write_text('{"prompt": ["c"]}\n')
    with pytest.raises(InputError, match=r"Couldn't cast .*; without source.config"):
        read(place, split="train")


def test_what_is_fetched_is_reused_and_its_content_is_the_key(folder: Path) -> None:
    source = OwnRows(path=str(folder), config="main", take=3)
    first = find_corpus(source)
    stamps = [path.stat().st_ctime_ns for path in first.rglob("*")]
    os.utime(first, (0, 0))
    assert find_corpus(source) == first
    assert [path.stat().st_ctime_ns for path in first.rglob("*")] == stamps
    assert first.stat().st_mtime > 0  # `alignflow gc` keeps what was used lately
    longer = find_corpus(source.model_copy(update={"take": 4}))
    assert longer != first
    assert user_artifact(longer)["digest"] != user_artifact(first)["digest"]
    write_rows(folder / "data/train-00000.parquet", range(50, 55))
    assert find_corpus(source) != first


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"config": "man"}, "source.config: .* has no config man; it has main, other"),
        ({"take": 1}, "source.config: .* has several configs; name one of main, other"),
        ({"config": "main", "split": "dev"}, "source.split: .* has no split dev; it has train, test"),
        ({"config": "main", "split": "train[:5]"}, r"no split train\[:5\]; .*source.take reads a part"),
        ({"config": "main", "columns": ["prompt", "chosen"]}, "source.columns: .* has no column chosen in"),
    ],
)
def test_an_unknown_name_is_refused_and_nothing_is_kept(
    folder: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        read(folder, **settings)
    assert not list((folder.parent / "home" / "hub").glob("*"))


def test_a_damaged_file_is_refused(folder: Path) -> None:
    (folder / "other/part.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="cannot be read by datasets"):
        read(folder, config="other")


def test_another_form_of_the_tables_is_written_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = OwnRows(path=str(folder), config="other")
    first = find_corpus(source)
    monkeypatch.setattr(hub_tables, "FORMAT", hub_tables.FORMAT + 1)
    assert find_corpus(source) != first


def test_a_full_disk_is_told_as_such(tmp_path: Path) -> None:
    place = tmp_path / "large"
    place.mkdir()
    draw = random.Random(0)
    rows = [{"prompt": f"{draw.getrandbits(2400):x}", "completion": "a"} for _ in range(2000)]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(DiskFailure, match="has reached the largest size allowed"):
            read(place, take=2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "home" / "hub").glob("*"))
    assert len(read(place, take=2000)) == 2000


@pytest.mark.parametrize("name", ["a[1]", "a*b", "a?b"])
def test_a_folder_that_datasets_takes_for_a_pattern_is_refused(name: str, tmp_path: Path) -> None:
    for place in (tmp_path / name, tmp_path / "a1b"):
        place.mkdir()
        (place / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match=r"has a character of a pattern, one of \[ \* \?: rename it"):
        read(tmp_path / name, take=1)
    assert [prompt for *_, prompt in read(tmp_path / name)] == ["a"]


@pytest.mark.parametrize("hub_id", ["a--b/c", "x..y", "foo/bar.git", f"owner/{'n' * 120}"])
@pytest.mark.parametrize("revision", [None, "0" * 40])
def test_an_invalid_id_is_refused_with_and_without_a_part(hub_id: str, revision: str | None) -> None:
    source = OwnRows(path=hub_id, revision=revision)
    with pytest.raises(InputError) as whole:
        find_corpus(source)
    with pytest.raises(InputError) as part:
        find_corpus(source.model_copy(update={"take": 1}))
    assert str(part.value) == str(whole.value)
    assert f"source.path: {hub_id} is neither a file or folder here nor a data set" in str(part.value)


def test_a_file_in_place_of_a_folder_is_refused(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(InputError, match=r"rows.jsonl is a file"):
        read(folder / "rows.jsonl", take=3)


def test_files_and_a_part_are_not_chosen_together() -> None:
    with pytest.raises(ValueError, match="files chooses files by their names"):
        HhRlhf(files="data/*", take=3)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # find_spec returns None
    with pytest.raises(InputError, match=r"need the package datasets: pip install 'alignflow\[train\]'"):
        read(folder, config="main")
