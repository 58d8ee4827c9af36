"""Fetch a part of a data set in the layout of the Hugging Face hub, by `datasets`, as local parquet files.

The files are kept in the home and used again without network. Each is named SPLIT/FILE after the file of the
data set that its rows come from: bad rows are reported with it, and a test set is recognised by its name.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.artifacts.artifact import content_digest
from tasks.artifacts.store import home
from tasks.config.sections.sources import HubSource
from tasks.system.errors import InputError
from tasks.system.files import replace_text
from tasks.system.hashing import digest_of
from tasks.system.locks import acquire

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

COMMIT = re.compile(r"[0-9a-f]{40}")
BATCH = 1000  # rows that are in memory at a time, and in a row group


class Origin(NamedTuple):
    """A data set, fixed at one state of its files."""

    root: str  # its folder, or its address on the hub
    version: str  # commit, or the digest of the folder; "" if the hub cannot be asked
    reason: str = ""  # why the hub could not be asked


def fetch_tables(source: HubSource) -> Path:
    """Return the folder with the rows that source.config, split, columns and take choose.

    Raises InputError.
    """
    settings = source.model_dump(include={"config", "split", "columns", "take"}, mode="json")
    place = Path(source.path).expanduser()
    name = source.path.strip("/").replace("/", "--") if not place.exists() else place.absolute().name
    known = home() / "hub" / f"{name}-{digest_of([source.path, source.revision, settings])[:16]}.commit"
    if place.is_dir():
        origin = Origin(str(place.resolve()), content_digest(place))
    elif place.exists():
        raise InputError(
            f"source.path: {place} is a file; source.config, split, columns and take need a folder"
        )
    else:
        origin = _find_commit(source.path, source.revision, known)
    tables = home() / "hub" / f"{name}-{digest_of([source.path, origin.version, settings])[:16]}"
    with _locked(tables):
        if not tables.is_dir():
            if origin.reason:
                raise InputError(
                    f"source.path: the hub cannot be asked for {source.path} ({origin.reason}), and nothing "
                    "is cached for these settings: connect to the network once, or name a folder"
                )
            _write_tables(source, origin, tables)
    if not place.exists():
        replace_text(known, origin.version)
    return tables


def _find_commit(hub_id: str, revision: str | None, known: Path) -> Origin:
    """Ask the hub for the commit of a branch or tag; without network, take the commit of the last time."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    commit, reason = revision or "", ""
    if not COMMIT.fullmatch(commit):
        try:
            commit = HfApi().dataset_info(hub_id, revision=revision).sha or ""
        except RevisionNotFoundError as error:
            raise InputError(f"source.revision: {hub_id} has no revision {revision} on the hub") from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"source.path: {hub_id} is neither a folder here nor a data set on the hub that you may read"
            ) from error
        except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
            commit, reason = known.read_text() if known.exists() else "", _first_line(error)
    return Origin(f"hf://datasets/{hub_id}@{commit}", commit, reason)


@contextmanager
def _locked(tables: Path) -> Iterator[None]:
    """Hold the lock of the tables, so that of two processes one fetches them."""
    locks = home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with acquire(locks / f"hub-{tables.name}.lock"):
        yield


def _write_tables(source: HubSource, origin: Origin, tables: Path) -> None:
    """Write the chosen rows of every chosen split; a killed process leaves no half of them."""
    unfinished = tables.with_name(f".{tables.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        builder = _open_builder(source, origin)
        with _refusing_unreadable(source.path):
            for split, files in _choose_splits(source, builder).items():
                names = [_file_name(str(file), origin.root) for file in files]
                rows = builder.as_streaming_dataset(split=split).with_format("arrow")
                if rows.num_shards != len(names) or len({*names}) != len(names):
                    raise InputError(f"source.path: {source.path} is no data set of rows of text")
                _write_split(rows, [unfinished / split / name for name in names], source)
        if not any(unfinished.rglob("*.parquet")):
            raise InputError(f"source.split: there is no row in {_listed(source.split) or source.path}")
        os.replace(unfinished, tables)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _open_builder(source: HubSource, origin: Origin) -> "DatasetBuilder":
    """Return the reader of one config of the data set. Raises InputError."""
    try:
        from datasets import get_dataset_config_names, load_dataset_builder
    except ImportError as error:
        raise InputError(
            "source.config, split, columns and take need the package datasets: pip install 'alignflow[train]'"
        ) from error
    is_local = Path(origin.root).is_absolute()
    place, revision = (origin.root, None) if is_local else (source.path, origin.version)
    with _refusing_unreadable(source.path):
        configs = get_dataset_config_names(place, revision=revision)
        if source.config and source.config not in configs:
            raise InputError(
                f"source.config: {source.path} has no config {source.config}; it has {_listed(configs)}"
            )
        try:
            return load_dataset_builder(place, source.config or None, revision=revision)
        except ValueError as error:
            if source.config or len(configs) < 2:
                raise
            raise InputError(
                f"source.config: {source.path} has several configs; name one of {_listed(configs)}"
            ) from error


def _choose_splits(source: HubSource, builder: "DatasetBuilder") -> dict[str, list[Any]]:
    """Return the files of each chosen split. Raises InputError."""
    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    if missing := [split for split in source.split if split not in files]:
        hint = "; source.take reads a part of one" if "[" in missing[0] else ""
        raise InputError(
            f"source.split: {source.path} has no split {missing[0]}; it has {_listed(files)}{hint}"
        )
    return {split: files[split] for split in source.split or files}


def _file_name(file: str, root: str) -> str:
    """Return a file's path within the data set, with the ending .parquet; its name if it lies outside."""
    inside = file.removeprefix(f"{root}/")
    parts = inside.split("/") if inside != file else [file.rpartition("/")[2]]
    name = "/".join(shown for part in parts if (shown := part.lstrip(".")))  # hidden files are not read
    return f"{name.removesuffix('.parquet')}.parquet"


def _write_split(rows: "IterableDataset", paths: list[Path], source: HubSource) -> None:
    """Write the first source.take rows of a split, one file for each of its own; not the empty ones."""
    left = source.take
    for number, path in enumerate(paths):
        if left == 0:
            return
        shard = rows.shard(len(paths), number)
        written = _write_file(shard.iter(BATCH), path, source, left)
        left = None if left is None else left - written


def _write_file(batches: Iterator[pa.Table], path: Path, source: HubSource, most: int | None) -> int:
    """Write at most ``most`` rows; return their number. Raises InputError for an unknown column."""
    writer, written = None, 0
    try:
        for batch in batches:
            table = batch if most is None else batch.slice(0, most - written)
            if missing := [name for name in source.columns if name not in table.column_names]:
                raise InputError(
                    f"source.columns: {source.path} has no column {missing[0]} in {path.stem}; it has "
                    f"{_listed(table.column_names)}"
                )
            table = table.select(source.columns) if source.columns else table
            if writer is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                writer = pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            written += table.num_rows
            if written == most:
                break
    finally:
        if writer is not None:
            writer.close()
    return written


@contextmanager
def _refusing_unreadable(path: str) -> Iterator[None]:
    """Turn the errors of `datasets` and the network into one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except InputError:
        raise
    except (
        DatasetsError,
        pa.ArrowException,
        httpx.HTTPError,
        OSError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"source.path: {path} cannot be read by datasets ({_first_line(error)}); without source.config, "
            "split, columns and take all of its files are read as they are"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _listed(names: Any) -> str:
    return ", ".join(names)
