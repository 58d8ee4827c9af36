"""Read parquet files by row groups, and Arrow files (of `datasets.save_to_disk`) by record batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.readers.blocks import batches
from tasks.dataset.readers.quarantine import quote
from tasks.system.errors import InputError

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARRO", b"\xff\xff\xff\xff"  # first four bytes
END_OF_STREAM = ARROW_STREAM + b"\0\0\0\0"
BATCH = 256  # rows that are Python objects at a time
LARGE_BATCH = 4096  # rows that are columns
UNREADABLE = "rows with a value that cannot be read"

# Numbers of consecutive row groups or record batches, and the bytes of the file up to their end.
BatchRange = tuple[list[int], int]


def iter_row_groups(path: Path, size: int) -> Iterator[BatchRange]:
    """Yield ranges of row groups of about ``size`` bytes of text. Raises InputError for a repeated column."""
    with pq.ParquetFile(path) as table:
        _refuse_repeated(table.schema_arrow, path)
        metadata = table.metadata
        sizes = ((n, metadata.row_group(n).total_byte_size) for n in range(metadata.num_row_groups))
        rows_done, num_rows = 0, max(metadata.num_rows, 1)
        for groups in batches(sizes, size):
            rows_done += sum(metadata.row_group(group).num_rows for group in groups)
            yield groups, path.stat().st_size * rows_done // num_rows


def read_row_groups(path: Path, groups: list[int]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of some row groups."""
    with pq.ParquetFile(path) as table:
        yield from table.iter_batches(batch_size=LARGE_BATCH, row_groups=groups)


def iter_record_batches(path: Path, size: int) -> Iterator[BatchRange]:
    """Yield ranges of record batches of about ``size`` bytes. Raises InputError for a repeated column."""
    bytes_done, file_size = 0, path.stat().st_size
    with _open_record_batches(path) as (schema, record_batches):
        _refuse_repeated(schema, path)
        sizes = [batch.nbytes for batch in record_batches]
    for numbers in batches(enumerate(sizes), size):
        bytes_done += sum(sizes[number] for number in numbers)
        yield numbers, min(bytes_done, file_size)


def read_record_batches(path: Path, numbers: list[int]) -> Iterator[pa.RecordBatch]:
    """Yield some consecutive record batches."""
    with _open_record_batches(path) as (_, record_batches):
        for batch in islice(record_batches, numbers[0], numbers[-1] + 1):
            batch.validate(full=True)  # pyarrow does not check offsets and texts when it maps an Arrow file
            for start in range(0, batch.num_rows, LARGE_BATCH):
                yield batch.slice(start, LARGE_BATCH)


def column_names(path: Path, head: bytes) -> list[str]:
    """Return the names of the columns of a file that begins with ``head``."""
    if head == PARQUET:
        with pq.ParquetFile(path) as table:
            return list(table.schema_arrow.names)
    with _open_record_batches(path) as (schema, _):
        return list(schema.names)


@contextmanager
def _open_record_batches(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Open an Arrow file of either format.

    Batches are views of the mapped file, so that skipping one costs nothing.
    """
    with pa.memory_map(str(path)) as file:
        head = file.read(len(ARROW_FILE))
        file.seek(0)
        if head == ARROW_FILE:
            with pa.ipc.open_file(file) as reader:
                yield reader.schema, (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        file.seek(max(file.size() - len(END_OF_STREAM), 0))
        if file.read() != END_OF_STREAM:
            raise pa.ArrowInvalid("the end of the stream is missing")
        file.seek(0)
        with pa.ipc.open_stream(file) as reader:
            yield reader.schema, iter(reader)


def _refuse_repeated(schema: pa.Schema, path: Path) -> None:
    if name := next(_iter_repeated(list(schema)), None):
        raise InputError(f"{path} has two columns named {quote(name)}: rename or leave out one of them.")


def _iter_repeated(fields: list[pa.Field]) -> Iterator[str]:
    """Yield every name that repeats among columns, or among the fields of a nested column."""
    names: set[str] = set()
    for field in fields:
        if field.name in names:
            yield field.name
        names.add(field.name)
        yield from _iter_repeated([field.type.field(number) for number in range(field.type.num_fields)])


def iter_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """Yield the rows of a batch as dictionaries; instead of a row that cannot be read, the reason."""
    for start in range(0, batch.num_rows, BATCH):
        yield from _to_rows(batch.slice(start, BATCH))


def _to_rows(batch: pa.RecordBatch) -> list[Any]:
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):  # text that is not UTF-8, or a date beyond Python's range
        return [_to_row(batch.slice(number, 1)) for number in range(batch.num_rows)]


def _to_row(one: pa.RecordBatch) -> Any:
    try:
        return one.to_pylist()[0]
    except (ValueError, OverflowError):
        return UNREADABLE
