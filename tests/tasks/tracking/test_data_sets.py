"""Test what MLflow is told of the data sets that a stage reads."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from mlflow.types.schema import Schema
from pyarrow import parquet

from tasks.artifacts.artifact import Artifact, user_artifact
from tasks.system.hashing import file_digest
from tasks.tracking.client import Tracker
from tasks.tracking.data_sets import as_mlflow_schema, data_sets_read
from tasks.tracking.entities import is_original


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNFLOW_HOME", str(tmp_path / "home"))
    rows = {"prompt": ["a", "b", "c"], "score": [1, 2, 3], "scores": [[0.5], [], [1.0]]}
    for name in ("reward", "evaluation_pairs", "rl"):
        parquet.write_table(pa.table(rows), tmp_path / f"{name}.parquet")
    return tmp_path


def artifact(folder: Path, *names: str, stage: str = "data") -> Artifact:
    files = {name: file_digest(folder / name) for name in names}
    return Artifact(
        stage=stage, key="k" * 64, digest="d" * 64, path="", files=files,
        seconds=0.0, peak_mb=0.0, cached=True, metrics={}, warnings=[],
    )  # fmt: skip


def test_only_the_tables_that_a_stage_reads_are_its_data_sets(tables: Path) -> None:
    data = artifact(tables, "reward.parquet", "evaluation_pairs.parquet")
    found = data_sets_read("dpo", {"data": data}, {"data": str(tables)})
    assert [(one.name, one.context) for one in found] == [
        ("reward", "training"),
        ("evaluation_pairs", "evaluation"),
    ]
    assert found[0].digest == file_digest(tables / "reward.parquet")[:36]
    size = (tables / "reward.parquet").stat().st_size
    assert json.loads(found[0].profile) == {"num_rows": 3, "bytes": size}
    uri = (tables / "reward.parquet").as_uri()
    assert json.loads(found[0].source) == {"uri": uri, "stage": "data", "key": "k" * 64}
    assert found[0].schema is not None
    read = Schema.from_json(json.dumps(json.loads(found[0].schema)["mlflow_colspec"]))
    assert [(column.name, str(column.type)) for column in read] == [
        ("prompt", "DataType.string"),
        ("score", "DataType.long"),
        ("scores", "Array(double)"),
    ]


def test_the_report_and_model_folders_are_no_readers_of_data(tables: Path) -> None:
    data, places = artifact(tables, "rl.parquet"), {"data": str(tables), "base": str(tables)}
    assert data_sets_read("report", {"data": data}, places) == []
    assert [one.name for one in data_sets_read("ppo", {"data": data}, places)] == ["rl"]
    assert data_sets_read("sft", {"base": user_artifact(tables)}, places) == []


def test_a_users_files_are_data_sets_without_a_schema(tables: Path) -> None:
    (tables / "posts.jsonl").write_text("{}\n")
    brought = user_artifact(tables / "posts.jsonl")
    places = dict.fromkeys(("source", "against0", "benchmark_arc"), str(tables / "posts.jsonl"))
    source, against = data_sets_read("data", {"source": brought, "against0": brought}, places)
    assert (source.name, source.context, source.schema) == ("posts.jsonl", "source", None)
    assert json.loads(source.profile) == {"bytes": 3}
    assert against.context == "evaluation"
    (benchmark,) = data_sets_read("benchmarks", {"benchmark_arc": brought}, places)
    assert (benchmark.name, benchmark.context) == ("posts.jsonl", "evaluation")
    assert benchmark.digest == brought["digest"][:36]


def test_a_damaged_table_is_still_named(tables: Path) -> None:
    (tables / "rl.parquet").write_text("no parquet")
    (found,) = data_sets_read("ppo", {"data": artifact(tables, "rl.parquet")}, {"data": str(tables)})
    assert (found.name, found.schema, json.loads(found.profile)) == ("rl", None, {"bytes": 10})


def test_results_of_stages_are_not_original(tables: Path) -> None:
    answers = artifact(tables, "rl.parquet", stage="answers")
    (found,) = data_sets_read("winrate", {"answers": answers}, {"answers": str(tables)})
    assert not is_original(found.source)
    (found,) = data_sets_read("ppo", {"data": artifact(tables, "rl.parquet")}, {"data": str(tables)})
    assert is_original(found.source)


def test_every_type_has_one_of_mlflows() -> None:
    types = {
        "text": pa.large_string(), "flag": pa.bool_(), "small": pa.int32(), "half": pa.float32(),
        "day": pa.timestamp("s"), "raw": pa.binary(), "nested": pa.struct([("a", pa.int64())]),
    }  # fmt: skip
    columns = json.loads(as_mlflow_schema(pa.schema(types)))["mlflow_colspec"]
    assert {column["name"]: column["type"] for column in columns} == {
        "text": "string", "flag": "boolean", "small": "integer", "half": "float",
        "day": "datetime", "raw": "binary", "nested": "string",
    }  # fmt: skip


def test_rows_that_another_process_inserts_at_the_same_moment_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(tmp_path, "http://mlflow:5000")
    ends: list[Exception | None] = [OSError("(psycopg2.errors.UniqueViolation) duplicate key"), None]

    def call(function: Any) -> None:
        if error := ends.pop(0):
            raise error

    monkeypatch.setattr(tracker, "call", call)
    tracker.insert(lambda client: None)
    assert ends == []
    ends.append(ValueError("no such run"))
    with pytest.raises(ValueError, match="no such run"):
        tracker.insert(lambda client: None)
    ends += [ValueError("UNIQUE constraint failed: inputs")] * 9
    monkeypatch.setattr("tasks.tracking.client.PAUSE", 0.0)
    with pytest.raises(ValueError, match="UNIQUE"):
        tracker.insert(lambda client: None)
