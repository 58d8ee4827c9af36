"""Read rows of JSON lines, JSON lists, parquet and Arrow files: one file, or all of a folder.

JSON may be gzipped.

A row that cannot be read is reported and left out. A truncated file is refused, because it is unknown what is
missing. Memory does not grow with the size of a file, only with that of a row; a row above MAX_ROW bytes is
left out.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

from tasks.dataset.readers import blocks, columnar_files
from tasks.dataset.readers.blocks import Block, batches
from tasks.dataset.readers.columnar_files import ARROW_FILE, ARROW_STREAM, PARQUET
from tasks.dataset.readers.json_rows import NOT_AN_OBJECT, Decoder, iter_lines, iter_list, parse_line
from tasks.dataset.readers.quarantine import Place, Quarantine
from tasks.system.errors import InputError, refusing_broken_gzip

PEEK = 2**16  # bytes that the format is recognised from
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.gz")
METADATA_FILES = {
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
}  # of a data set
GZIP = b"\x1f\x8b"
GROUPS, RECORDS, LINES, VALUES = "groups", "records", "lines", "values"  # forms of blocks
HINT = "give JSON lines, a JSON list, parquet or a folder of datasets.save_to_disk"


Piece: TypeAlias = pa.RecordBatch | Iterable[Any]  # rows of a block: in columns, or as values of JSON


class Row(NamedTuple):
    """A row with its place in the source."""

    place: Place
    fields: dict[str, Any]


def read_rows(path: Path, bad: Quarantine, watch: Callable[[int, int], None] | None = None) -> Iterator[Row]:
    """Yield every row that is an object, in the order of the files' names; ``bad`` records the others.

    ``watch(bytes_read, size)`` is called after each block. Raises InputError for a missing or damaged file, a
    folder without files of these formats, or another format.
    """
    size, number, file = sum(one.stat().st_size for one in list_files(path)), 0, ""
    for block in iter_blocks(path):
        if block.file != file:
            number, file = 0, block.file
        for fields in read_block(block):
            number += 1
            bad.rows += 1
            if isinstance(fields, dict):
                yield Row(Place(file, number), fields)
            else:
                bad(Place(file, number), fields)
        if watch:
            watch(block.bytes_read, size)


def iter_blocks(path: Path, columns: frozenset[str] = frozenset()) -> Iterator[Block]:
    """Yield blocks of about ``blocks.BLOCK_BYTES`` of text of the files, in the order of their names.

    With ``columns`` only of files that have these columns (see ``split_by_columns``). Raises InputError.
    """
    bytes_before = 0
    for file in split_by_columns(path, columns)[0]:
        name, size = blocks.display_name(file, path), file.stat().st_size
        for form, content, offset in _iter_pieces(file, blocks.BLOCK_BYTES):
            is_in_file = form in (GROUPS, RECORDS)
            yield Block(file, name, form, content, bytes_before + min(offset, size), is_in_file=is_in_file)
        bytes_before += size


def read_block(block: Block) -> Iterator[dict[str, Any] | str]:
    """Yield every row of a block; instead of a row that cannot be read, the reason. Raises InputError."""
    for piece in read_pieces(block):
        yield from iter_rows(piece)


def read_pieces(block: Block) -> Iterator[Piece]:
    """Yield the rows of a block in the columns of its file, or all its values of JSON. Raises InputError."""
    content = blocks.load_content(block)
    with _refusing_damaged_files(block.path):
        if block.form == LINES:
            yield map(partial(parse_line, Decoder()), io.BytesIO(content))
        elif block.form == VALUES:
            yield json.loads(content)
        elif block.form == GROUPS:
            yield from columnar_files.read_row_groups(block.path, json.loads(content))
        else:
            yield from columnar_files.read_record_batches(block.path, json.loads(content))


def iter_rows(piece: Piece) -> Iterator[dict[str, Any] | str]:
    """Yield every row of a piece; instead of a row that cannot be read, the reason."""
    for value in columnar_files.iter_rows(piece) if isinstance(piece, pa.RecordBatch) else piece:
        yield value if isinstance(value, dict | str) else NOT_AN_OBJECT


def list_files(path: Path) -> list[Path]:
    """Return the files of rows of a folder, sorted by name, or the file itself. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path} does not exist: give a file or a folder of JSON lines or parquet.")
    if path.is_file():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.name.endswith(ENDINGS)
        and file.name not in METADATA_FILES
        and not _is_hidden(file, path)
        and file.is_file()
    )
    arrow_folders = {file.parent for file in found if file.suffix == ".arrow"}
    saved = {folder: _saved_by_datasets(folder) for folder in arrow_folders}
    files = []
    for file in found:
        names = saved.get(file.parent)
        if not names or file.suffix != ".arrow" or file.name in names:
            files.append(file)
    if not files:
        raise InputError(f"{path} holds no file that ends in {', '.join(ENDINGS)}: {HINT}.")
    return files


def _is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a name below the folder begins with a dot: .git, or macOS's ._rows.jsonl."""
    return any(name.startswith(".") for name in file.relative_to(folder).parts)


def _saved_by_datasets(folder: Path) -> set[str]:
    """Return the names of the files that datasets.save_to_disk wrote to a folder, where it also keeps caches.

    No names if it did not write this folder.
    """
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return set()
    files = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(files, list):
        return set()
    return {str(file["filename"]) for file in files if isinstance(file, dict) and "filename" in file}


def split_by_columns(path: Path, columns: frozenset[str]) -> tuple[list[Path], list[Path]]:
    """Return the files whose rows have these columns, and the other files of a published set.

    Raises InputError.

    A file whose columns cannot be read counts as having them, and so do all files if none has: reading them
    raises the helpful error.
    """
    files = list_files(path)
    if not columns or len(files) == 1:
        return files, []
    others = [file for file in files if (names := _column_names(file)) and not columns <= names]
    if len(others) == len(files):
        return files, []
    return [file for file in files if file not in others], others


def _column_names(file: Path) -> set[str]:
    """Return the columns of a file's first rows; none if no row can be read."""
    with file.open("rb") as stream:
        head = stream.read(4)
    with _refusing_damaged_files(file):
        if head in (PARQUET, ARROW_FILE, ARROW_STREAM):
            return set(columnar_files.column_names(file, head))
    form, content, _ = next(_iter_pieces(file, PEEK), (LINES, b"", 0))
    rows = read_block(Block(file, file.name, form, content, 0))
    return {name for row in rows if isinstance(row, dict) for name in row}


def _iter_pieces(path: Path, size: int) -> Iterator[tuple[str, bytes, int]]:
    """Yield (form, content, bytes of the file read) of each block."""
    with path.open("rb") as file, _refusing_damaged_files(path):
        head = file.peek(4)[:4]
        if head == PARQUET:
            for groups, bytes_read in columnar_files.iter_row_groups(path, size):
                yield GROUPS, blocks.to_json(groups), bytes_read
            return
        if head in (ARROW_FILE, ARROW_STREAM):
            for numbers, bytes_read in columnar_files.iter_record_batches(path, size):
                yield RECORDS, blocks.to_json(numbers), bytes_read
            return
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file)) if head.startswith(GZIP) else file
        start = stream.peek(PEEK)[:PEEK].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if not start:
            raise InputError(f"{path} is empty: fetch or export it again.")
        if start == b"{":
            lines = ((line, len(line)) for line in iter_lines(stream))
            yield from ((LINES, b"".join(batch), file.tell()) for batch in batches(lines, size))
        elif start == b"[":
            for batch in batches(iter_list(stream, path), size):
                yield VALUES, blocks.to_json(batch), file.tell()
        else:
            raise InputError(f"{path} is in another format: {HINT}.")


@contextmanager
def _refusing_damaged_files(path: Path) -> Iterator[None]:
    try:
        with refusing_broken_gzip(path):
            yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is damaged or truncated ({str(error).splitlines()[0][:120]}): fetch it again."
        ) from error
