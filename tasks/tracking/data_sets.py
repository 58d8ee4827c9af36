"""Describe the data sets that a stage reads: name, rows and schema, digest and source.

Rows and schema come from the metadata at the end of a parquet file: no table is loaded.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.artifacts.artifact import Artifact, content
from tasks.config.benchmark_files import PREFIX
from tasks.tracking.entities import DataSet

if TYPE_CHECKING:
    from pyarrow import DataType, Schema

PARQUET = ".parquet"
TRAINING = (
    "corpus",
    "finetune",
    "reward",
    "reward_groups",
    "rl",
    "reference",
    "comparisons",
)  # tables that models learn from
MAX_DIGEST = 36  # characters; MLflow's limit
MAX_SCHEMA = 60_000  # characters; MLflow takes 65,535


def data_sets_read(stage: str, inputs: dict[str, Artifact], places: dict[str, str]) -> list[DataSet]:
    """Return the data sets among the inputs of a stage, which lie at ``places``.

    These are the parquet files that the program reads, and the user's files of questions, benchmarks and text
    that is mixed in. The report, which draws what the others have read and measured, has none.
    """
    if stage == "report":
        return []
    found: list[DataSet] = []
    for name, artifact in inputs.items():
        place = Path(places[name])
        if stage == "data" or name.startswith(PREFIX) or name in ("reward_bench", "text"):
            found.append(_raw(stage, name, artifact, place))
        else:
            tables = (path for path in artifact["files"] if path.endswith(PARQUET))
            found += [_table(artifact, place, path) for path in tables]
    return found


def _raw(stage: str, name: str, artifact: Artifact, place: Path) -> DataSet:
    """Return a file or folder of questions as a data set, without a schema."""
    is_source = stage == "data" and not name.startswith("against")
    return DataSet(
        name=Path(artifact["path"]).name,
        digest=content(artifact)[:MAX_DIGEST],
        context="training" if name == "text" else "source" if is_source else "evaluation",
        source=_source(artifact, place),
        schema=None,
        profile=json.dumps({"bytes": place.stat().st_size} if place.is_file() else {}),
    )


def _table(artifact: Artifact, place: Path, path: str) -> DataSet:
    file, name = place / path, Path(path).stem
    rows, schema = _read_metadata(file)
    return DataSet(
        name=name,
        digest=artifact["files"][path][:MAX_DIGEST],
        context="training" if name in TRAINING else "evaluation",
        source=_source(artifact, file),
        schema=schema,
        profile=json.dumps({**rows, "bytes": file.stat().st_size}),
    )


def _source(artifact: Artifact, file: Path) -> str:
    made = {} if artifact["stage"] == "given" else {"stage": artifact["stage"], "key": artifact["key"]}
    return json.dumps({"uri": file.as_uri(), **made})


def _read_metadata(file: Path) -> tuple[dict[str, int], str | None]:
    """Return rows and schema of a parquet file; nothing of a damaged one, which its program will refuse."""
    from pyarrow import ArrowInvalid, parquet

    try:
        with parquet.ParquetFile(file) as table:
            schema = as_mlflow_schema(table.schema_arrow)
            return {"num_rows": table.metadata.num_rows}, schema if len(schema) <= MAX_SCHEMA else None
    except ArrowInvalid:
        return {}, None


def as_mlflow_schema(schema: "Schema") -> str:
    """Return an Arrow schema as the JSON of MLflow's column specification."""
    columns = [
        {"name": field.name, **_as_mlflow_type(field.type), "required": not field.nullable}
        for field in schema
    ]
    return json.dumps({"mlflow_colspec": columns})


def _as_mlflow_type(kind: "DataType") -> dict[str, Any]:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return {"type": "array", "items": _as_mlflow_type(kind.value_type)}
    if types.is_boolean(kind):
        return {"type": "boolean"}
    if types.is_integer(kind):
        return {"type": "long" if kind.bit_width == 64 else "integer"}
    if types.is_floating(kind):
        return {"type": "double" if kind.bit_width == 64 else "float"}
    if types.is_temporal(kind):
        return {"type": "datetime"}
    if types.is_binary(kind) or types.is_large_binary(kind):
        return {"type": "binary"}
    return {"type": "string"}
