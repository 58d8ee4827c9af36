"""Write the chosen rows of a data set in the layout of the Hugging Face hub to parquet files, by `datasets`.

python -m tasks.programs.data_stage.hub_rows FOLDER CHOICE

CHOICE is a Choice as JSON. FOLDER gets SPLIT/FILE for each file of the data set, so that readers of the rows
know their place and recognise test sets by name. Exits with status 2 and one sentence if that is impossible,
with 3 and one sentence if a disk refuses a write.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetBuilder, IterableDataset, config, get_dataset_config_names, load_dataset_builder
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError

from tasks.system.errors import DiskFailure, InputError, StageFailed, disk_failure

BATCH = 1000  # rows that are in memory at a time, and in a row group


class Choice(NamedTuple):
    """Which rows of which data set are wanted."""

    path: str  # a hub id, or a folder
    commit: str | None  # None: a folder
    config: str  # "": the default one
    split: list[str]  # empty: all
    columns: list[str]  # empty: all
    take: int | None  # of each split; None: all

    @property
    def root(self) -> str:
        """Return what the addresses of its files begin with."""
        return self.path if self.commit is None else f"hf://datasets/{self.path}@{self.commit}"


def main() -> None:
    """Write the rows."""
    status = 0
    try:
        write_rows(Choice(**json.loads(sys.argv[2])), Path(sys.argv[1]))
    except (InputError, StageFailed) as error:
        print(error, file=sys.stderr, flush=True)
        status = 3 if isinstance(error, DiskFailure) else 2 if isinstance(error, InputError) else 1
    # a stream that is left before its end has threads that read ahead, which abort a usual end of Python
    os._exit(status)


def write_rows(choice: Choice, folder: Path) -> None:
    """Write the first rows of every chosen split. Raises InputError, DiskFailure and StageFailed."""
    with _refusing_unreadable(choice.path):
        builder = _open_builder(choice)
        for split, files in _choose_splits(choice, builder).items():
            names = [_file_name(str(file), choice.root) for file in files]
            rows = builder.as_streaming_dataset(split=split).with_format("arrow")
            if rows.num_shards != len(names) or len({*names}) != len(names):
                raise InputError(f"source.path: {choice.path} is no data set of rows of text")
            _write_split(rows, [folder / split / name for name in names], choice)
    if not any(folder.rglob("*.parquet")):
        raise InputError(f"source.split: there is no row in {_listed(choice.split) or choice.path}")


def _open_builder(choice: Choice) -> DatasetBuilder:
    """Return the reader of one config of the data set. Raises InputError."""
    configs = get_dataset_config_names(choice.path, revision=choice.commit)
    if choice.config and choice.config not in configs:
        raise InputError(
            f"source.config: {choice.path} has no config {choice.config}; it has {_listed(configs)}"
        )
    try:
        return load_dataset_builder(choice.path, choice.config or None, revision=choice.commit)
    except ValueError as error:
        if choice.config or len(configs) < 2:
            raise
        raise InputError(
            f"source.config: {choice.path} has several configs; name one of {_listed(configs)}"
        ) from error


def _choose_splits(choice: Choice, builder: DatasetBuilder) -> dict[str, list[Any]]:
    """Return the files of each chosen split. Raises InputError."""
    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    if missing := [split for split in choice.split if split not in files]:
        hint = "; source.take reads a part of one" if "[" in missing[0] else ""
        raise InputError(
            f"source.split: {choice.path} has no split {missing[0]}; it has {_listed(files)}{hint}"
        )
    return {split: files[split] for split in choice.split or files}


def _file_name(file: str, root: str) -> str:
    """Return a file's path within the data set, with the ending .parquet; its name if it lies outside."""
    inside = file.removeprefix(f"{root}/")
    parts = inside.split("/") if inside != file else [file.rpartition("/")[2]]
    name = "/".join(shown for part in parts if (shown := part.lstrip(".")))  # hidden files are not read
    return f"{name.removesuffix('.parquet')}.parquet"


def _write_split(rows: IterableDataset, paths: list[Path], choice: Choice) -> None:
    """Write the first choice.take rows of a split, one file for each of its own; not the empty ones."""
    left = choice.take
    for number, path in enumerate(paths):
        if left == 0:
            return
        shard = rows.shard(len(paths), number)
        written = _write_file(shard.iter(BATCH), path, choice, left)
        left = None if left is None else left - written


def _write_file(batches: Iterator[pa.Table], path: Path, choice: Choice, most: int | None) -> int:
    """Write at most ``most`` rows; return their number.

    Raises InputError for an unknown column, DiskFailure and StageFailed.
    """
    writer, written = None, 0
    try:
        for batch in batches:
            table = batch if most is None else batch.slice(0, most - written)
            if missing := [name for name in choice.columns if name not in table.column_names]:
                raise InputError(
                    f"source.columns: {choice.path} has no column {missing[0]} in {path.stem}; it has "
                    f"{_listed(table.column_names)}"
                )
            table = table.select(choice.columns) if choice.columns else table
            with _writing(path):
                if writer is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    writer = pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
            written += table.num_rows
            if written == most:
                break
    finally:
        if writer is not None:
            with _writing(path):
                writer.close()
    return written


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell a file that cannot be written from data that cannot be read. Raises DiskFailure, StageFailed."""
    try:
        yield
    except OSError as error:
        reason = f"{path} cannot be written ({_first_line(error)})"
        raise disk_failure(error, path.parent) or StageFailed(reason) from error


@contextmanager
def _refusing_unreadable(path: str) -> Iterator[None]:
    """Turn the errors of `datasets` and the network into one sentence. Raises InputError and DiskFailure."""
    try:
        yield
    except InputError:
        raise
    except (
        DatasetsError,
        pa.ArrowException,
        HTTPError,
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        if failure := disk_failure(error, Path(config.HF_CACHE_HOME)):  # the cache of `datasets`
            raise failure from error
        raise InputError(
            f"source.path: {path} cannot be read by datasets ({_first_line(error)}); without source.config, "
            "split, columns and take all of its files are read as they are"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _listed(names: Any) -> str:
    return ", ".join(names)


if __name__ == "__main__":
    main()
