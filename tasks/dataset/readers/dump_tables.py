"""Read the tables of a Stack Exchange dump in blocks of rows.

As published (the .7z or its Posts.xml) or exported (Posts.csv), also gzipped. Real dumps have a byte-order
mark and CRLF, and control characters, which are removed. A row that cannot be read is reported with the
reason, and the others are read. Memory does not grow with the size of the file.
"""

import csv
import gzip
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
from lxml import etree

from tasks.dataset.readers import blocks, dump_xml
from tasks.dataset.readers.blocks import Block, batches
from tasks.dataset.readers.csv_columns import POSTS, find_columns, find_delimiter, read_fields
from tasks.dataset.readers.xml_characters import CONTROLS, WithoutControls, detect_utf_16, to_utf_8
from tasks.system.errors import InputError, refusing_broken_gzip

SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c"
GZIP = b"\x1f\x8b"
XML, FIELDS = "xml", "fields"  # forms of blocks
ROW_OVERHEAD = 100  # bytes that are assumed for a row without its body
ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def iter_blocks(path: Path, table: str = POSTS) -> Iterator[Block]:
    """Yield a table of the dump in blocks of about ``blocks.BLOCK_BYTES`` of text. Raises InputError."""
    size, member = file_size(path), f"{table.capitalize()}.xml"
    with (
        path.open("rb") as file,
        _refusing_damaged_files(path),
        _open_unpacked(file, path, member) as stream,
    ):
        for form, content in _iter_pieces(stream, path, blocks.BLOCK_BYTES, table):
            yield Block(path, path.name, form, content, min(file.tell(), size))


def read_rows(block: Block) -> Iterator[Mapping[str, str] | str]:
    """Yield every row of a block by the names of its columns; instead of one that cannot be read, the reason.

    Raises InputError.
    """
    with _refusing_damaged_files(block.path):
        content = blocks.load_content(block)
        yield from dump_xml.parse_rows(content, block.path) if block.form == XML else orjson.loads(content)


def file_size(path: Path) -> int:
    """Return the bytes of a dump's file. Raises InputError if it is missing, no file, or empty."""
    if not path.exists():
        raise InputError(
            f"{path} does not exist: give the path of a .7z, or of a Posts.xml or Posts.csv, also gzipped."
        )
    if not path.is_file():
        raise InputError(f"{path} is not a file: give the .7z, Posts.xml or Posts.csv itself, also gzipped.")
    if not (size := path.stat().st_size):
        raise InputError(f"{path} is empty: fetch or unpack it again.")
    return size


@contextmanager
def _refusing_damaged_files(path: Path) -> Iterator[None]:
    try:
        with refusing_broken_gzip(path):
            yield
    except csv.Error as error:
        raise InputError(
            f"{path} is a damaged or truncated CSV ({error}): export or fetch it again."
        ) from error
    except etree.XMLSyntaxError as error:
        reason = CONTROL.sub(" ", error.msg or "")[:120].strip()
        raise InputError(
            f"{path} is damaged, truncated or not a Posts.xml ({reason}): fetch or unpack it again."
        ) from error


@contextmanager
def _open_unpacked(file: io.BufferedReader, path: Path, member: str) -> Iterator[Any]:
    """Open the dump's table, unpacked as its content (not the file's name) requires."""
    head = file.peek(len(SEVEN_ZIP))
    if head.startswith(SEVEN_ZIP):
        from tasks.dataset.readers import seven_zip  # most dumps come without, and it is slow to import

        with seven_zip.open_member(file, path, member) as stream:
            yield stream
    elif head.startswith(GZIP):
        yield io.BufferedReader(gzip.GzipFile(fileobj=file))
    else:
        yield file


def _iter_pieces(
    stream: "io.BufferedReader[Any]", path: Path, size: int, table: str
) -> Iterator[tuple[str, bytes]]:
    """Yield (form, content) of each block. The content decides the format, not the file's name."""
    head = stream.peek(64)
    for magic, archive in ARCHIVES.items():
        if head.startswith(magic):
            raise InputError(f"{path} is a {archive} archive: unpack it and give the Posts.xml inside.")
    rows: Iterator[Mapping[str, str] | str]
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") or detect_utf_16(head):
        text = to_utf_8(stream, path)
        start = text.read(dump_xml.HEAD).translate(None, CONTROLS)
        if dump_xml.is_plain(start, table):
            for row_block in dump_xml.iter_row_blocks(start, text, path, size, table):
                yield XML, row_block
            return
        rows = dump_xml.iter_unusual_rows(start, text, path, table)
    else:
        rows = _iter_csv_rows(stream, path, table)
    for batch in batches(((row, _row_size(row)) for row in rows), size):
        yield FIELDS, orjson.dumps(batch)


def _row_size(row: Mapping[str, str] | str) -> int:
    return ROW_OVERHEAD + (0 if isinstance(row, str) else len(row.get("Body", "")))


def _iter_csv_rows(
    stream: "io.BufferedReader[Any]", path: Path, table: str
) -> Iterator[Mapping[str, str] | str]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than some posts
    clean = io.BufferedReader(WithoutControls(stream), blocks.READ_BYTES)
    delimiter = find_delimiter(clean.peek(dump_xml.HEAD))
    text = io.TextIOWrapper(clean, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(reader, [])
    columns, width = tuple(find_columns(header, table, path).items()), len(header)
    for row in reader:
        if row:  # not an empty line
            yield read_fields(row, width, columns)
