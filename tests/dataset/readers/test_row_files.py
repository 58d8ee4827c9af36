"""Rows of files: names that come twice, Arrow files, and values that Python cannot hold."""

import gzip
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.dataset.readers import blocks
from tasks.dataset.readers.quarantine import MOST_REASONS, OTHER_REASONS, Place, Quarantine, quote
from tasks.dataset.readers.row_files import Row, read_rows
from tasks.system.errors import InputError

FIELDS = [{"prompt": f"p{n}", "n": n, "text": "ü\n\"'" * n} for n in range(300)]


def read(path: Path) -> tuple[list[Row], Quarantine]:
    bad = Quarantine()
    return list(read_rows(path, bad)), bad


def write_arrow(rows: list[dict[str, Any]], path: Path, *, as_file: bool = False, batch: int = 50) -> None:
    table = pa.Table.from_pylist(rows)
    new = pa.ipc.new_file if as_file else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def test_hidden_files_of_a_folder_are_none_of_its_rows(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "rows"
    for name in ("._rows.jsonl", ".ipynb_checkpoints/rows-checkpoint.jsonl", "rows.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"prompt": "p"}' if name[1] != "_" else "\0\5\26\7")
    assert [row.place for row in read(folder)[0]] == [Place("rows.jsonl", 1)]


TWICE = '{"prompt": "p", "chosen": "a", "chosen": "b"}'
NESTED = '{"prompt": [{"role": "user", "content": "a", "content": "b"}]}'


@pytest.mark.parametrize(("row", "name"), [(TWICE, "chosen"), (NESTED, "content")])
@pytest.mark.parametrize("form", ["f.jsonl", "f.jsonl.gz", "f.json"])
def test_a_json_row_that_names_a_column_twice_is_put_aside(
    tmp_path: Path, row: str, name: str, form: str
) -> None:
    good = json.dumps(FIELDS[3])
    text = f"{good}\n{row}\n{good}\n" if "jsonl" in form else f"[{good}, {row}, {good}]"
    (tmp_path / form).write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    found, bad = read(tmp_path / form)
    assert [row.fields for row in found] == [FIELDS[3]] * 2
    assert bad.reasons == {f"rows that name '{name}' twice": 1}


@pytest.mark.parametrize("form", ["f.parquet", "f.arrow"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path, form: str, nested: bool) -> None:
    names = ["chosen", "chosen"]
    columns = [pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(columns, names=names)
    if nested:
        table = pa.table(
            {"turns": pa.array([["a"]]), "pair": pa.StructArray.from_arrays(columns, names=names)}
        )
    if form == "f.parquet":
        pq.write_table(table, tmp_path / form)
    else:
        with pa.OSFile(str(tmp_path / form), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(
        InputError, match=r"f\.\w+ has two columns named 'chosen': rename or leave out one of them\."
    ):
        read(tmp_path / form)


@pytest.mark.parametrize("as_file", [False, True])
def test_arrow_files_give_the_same_rows(
    tmp_path: Path, as_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 4000)
    write_arrow(FIELDS, tmp_path / "data-00000-of-00001.arrow", as_file=as_file)
    found, bad = read(tmp_path / "data-00000-of-00001.arrow")
    assert [row.fields for row in found] == FIELDS
    assert [row.place.row for row in found] == list(range(1, 301))
    assert (bad.rows, bad.reasons) == (300, {})


def test_a_saved_data_set_dictionary_is_read_without_the_files_about_it(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        write_arrow(FIELDS[:5], tmp_path / split / "data-00000-of-00001.arrow")
        for name in ("state.json", "dataset_info.json"):
            (tmp_path / split / name).write_text(
                '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}'
            )
        write_arrow(FIELDS[:3], tmp_path / split / "cache-1b2c.arrow")  # what map() left behind
    found, bad = read(tmp_path)
    assert [row.place.file for row in found] == ["test/data-00000-of-00001.arrow"] * 5 + [
        "train/data-00000-of-00001.arrow"
    ] * 5
    assert bad.reasons == {}


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("cut", [4, 8, 9, 400, 3000])
def test_an_arrow_file_that_breaks_off_is_refused(tmp_path: Path, as_file: bool, cut: int) -> None:
    path = tmp_path / "f.arrow"
    write_arrow(FIELDS, path, as_file=as_file)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match="is damaged or truncated") as refused:
        read(path)
    assert len(str(refused.value).splitlines()) == 1


def test_an_arrow_stream_that_ends_between_two_batches_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(FIELDS)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file:
        writer = pa.ipc.new_stream(file, table.schema)
        writer.write_table(table)
        size = file.tell()
        writer.close()
    content = (tmp_path / "f.arrow").read_bytes()[:size]
    (tmp_path / "f.arrow").write_bytes(content)
    with pytest.raises(InputError, match="the end of the stream is missing"):
        read(tmp_path / "f.arrow")


@pytest.mark.parametrize("form", ["f.parquet", "f.arrow"])
def test_a_value_that_python_cannot_hold_costs_its_own_row_only(tmp_path: Path, form: str) -> None:
    days = pa.array([0, 10**7, 1], pa.date32())
    table = pa.table({"prompt": ["p", "q", "r"], "day": days})
    if form == "f.parquet":
        pq.write_table(table, tmp_path / form)
    else:
        with pa.OSFile(str(tmp_path / form), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    found, bad = read(tmp_path / form)
    assert [row.fields for row in found] == [
        {"prompt": "p", "day": date(1970, 1, 1)},
        {"prompt": "r", "day": date(1970, 1, 2)},
    ]
    assert bad.reasons == {"rows with a value that cannot be read": 1}


def test_text_that_is_no_utf8_in_parquet_costs_its_own_row_only(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"prompt": texts}), tmp_path / "f.parquet")
    found, bad = read(tmp_path / "f.parquet")
    assert [row.fields["prompt"] for row in found] == ["good", "fine"]
    assert bad.reasons.total() == 1


def test_reasons_that_quote_names_of_the_rows_do_not_grow_without_end() -> None:
    bad = Quarantine()
    for number in range(MOST_REASONS + 7):
        bad(Place("f", number), f"rows that name '{number}' twice")
    assert len(bad.reasons) == MOST_REASONS + 1
    assert bad.reasons[OTHER_REASONS] == 7
    assert quote("a\n\x1b" + "b" * 100) == "'a��" + "b" * 36 + "…'"
