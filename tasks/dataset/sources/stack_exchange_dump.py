"""Posts of a Stack Exchange dump, as published (the .7z or its Posts.xml) or exported (Posts.csv), also gzipped: one plain tuple each.

Facts of real dumps that this reads: a byte-order mark and CRLF; AcceptedAnswerId, Title, OwnerUserId and ContentLicense may be missing; CSV
exports write ids as floats ("62.0"), NULL or NA for nothing, and bodies over several lines; control characters, which are left out. A row that
cannot be read is told with the reason, and the rest is read. Memory stays flat whatever the size of the file.
"""

import csv
import gzip
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lxml import etree

from tasks.dataset.readers import blocks
from tasks.dataset.readers.blocks import Block, batches
from tasks.dataset.readers.csv_columns import NOT_UTF_8, POSTS, find_columns, find_delimiter, read_fields
from tasks.dataset.readers.quarantine import Place, Quarantine
from tasks.dataset.readers.xml_characters import CONTROLS, WithoutControls, detect_utf_16, repair, to_utf_8
from tasks.system.errors import InputError, refusing_broken_gzip

SEVEN_ZIP = b"7z\xbc\xaf\x27\x1c"
QUESTION, ANSWER = "1", "2"
OTHER_TYPES = "post types other than question and answer"
NOT_XML = "rows that are not well-formed XML"
XML, FIELDS = "xml", "fields"  # forms of blocks
ROW, HEAD = b"<row", 2**16
# how a dump begins
PLAIN = re.compile(
    rb"(\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>)?(?:\s|<!--.*?-->)*<(?P<table>\w+)(?:\s[^<>]*)?>(?:\s|<!--.*?-->)*\Z",
    re.DOTALL,
)
LONGEST_ROW = 2**25
NOT_POSTS = "{} is XML but not a Posts.xml (no <row>s under <posts>): give the Posts.xml of a dump."
ARCHIVES = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Unreadable(NamedTuple):
    """A row that cannot be read."""

    reason: str  # what to call several of them


class Post(NamedTuple):
    """A question or an answer; what the dump does not say is 0 or ""."""

    id: int
    parent: int  # the question that an answer belongs to; 0 in a question
    accepted: int  # a question's accepted answer
    votes: int
    created: str  # ISO 8601, UTC
    title: str
    body: str  # HTML
    author_id: str
    author_name: str
    licence: str


def read_posts(
    path: Path, dropped: Counter[str], bad: Quarantine, watch: Callable[[int, int], None] | None = None
) -> Iterator[Post]:
    """Every question and answer of the dump, in the file's order.

    ``dropped`` counts by kind the rows that are neither, ``bad`` is told of those that cannot be read; ``watch(read, size)``, in bytes of the file,
    is called after each block. InputError: no such file, not a dump, or a damaged one.
    """
    size, number = file_size(path), 0
    for block in iter_blocks(path):
        for post in read_posts_of(block):
            number += 1
            bad.rows += 1
            if isinstance(post, Post):
                yield post
            elif isinstance(post, Unreadable):
                bad(Place(block.file, number), post.reason)
            else:
                dropped[post] += 1
        if watch:
            watch(block.read, size)


def iter_blocks(path: Path, table: str = POSTS) -> Iterator[Block]:
    """A table of the dump in blocks of about ``blocks.SIZE`` bytes of text. Raises InputError."""
    whole = file_size(path)
    with (
        path.open("rb") as file,
        _refusing_damaged_files(path),
        _open_unpacked(file, path, f"{table.capitalize()}.xml") as stream,
    ):
        for form, content in _iter_pieces(stream, path, blocks.BLOCK_BYTES, table):
            yield Block(path, path.name, form, content, min(file.tell(), whole))


def read_posts_of(block: Block) -> Iterator[Post | Unreadable | str]:
    """Yield every row of a block as a post; what is none by its kind, what cannot be read with the reason. Raises InputError."""
    yield from map(_parse_post, read_fields_of(block))


def read_fields_of(block: Block) -> Iterator[Mapping[str, str] | str]:
    """Yield every row of a block by the names of its columns, or the reason why it cannot be read. Raises InputError."""
    with _refusing_damaged_files(block.path):
        rows = blocks.load_content(block)
        yield from _parse_rows(rows, block.path) if block.form == XML else rows


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
        raise InputError(
            f"{path} is damaged, truncated or not a Posts.xml ({_one_line(error.msg)}): fetch or unpack it again."
        ) from error


def file_size(path: Path) -> int:
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
def _open_unpacked(file: io.BufferedReader, path: Path, member: str) -> Iterator[Any]:
    """The bytes of the dump, unpacked; the content (never the file's name) shows how."""
    head = file.peek(len(SEVEN_ZIP))
    if head.startswith(SEVEN_ZIP):
        from tasks.dataset.readers import seven_zip  # most dumps come without, and it is slow to import

        with seven_zip.open_member(file, path, member) as stream:
            yield stream
    elif head.startswith(b"\x1f\x8b"):
        yield io.BufferedReader(gzip.GzipFile(fileobj=file))
    else:
        yield file


def _iter_pieces(
    stream: "io.BufferedReader[Any]", path: Path, size: int, table: str
) -> Iterator[tuple[str, Any]]:
    """(form, content) of each block, in whichever format the content shows."""
    head = stream.peek(64)
    for magic, archive in ARCHIVES.items():
        if head.startswith(magic):
            raise InputError(f"{path} is a {archive} archive: unpack it and give the Posts.xml inside.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") or detect_utf_16(head):
        text = to_utf_8(stream, path)
        begun = text.read(HEAD).translate(None, CONTROLS)
        plain = PLAIN.match(begun[: begun.find(ROW)] if ROW in begun else b"")
        if plain and plain["table"] == table.encode():
            yield from (
                (XML, rows) for rows in _iter_xml_blocks(begun[begun.find(ROW) :], text, path, size, table)
            )
            return
        rows: Iterator[Any] = _iter_unusual_xml_rows(_Prefixed(begun, text), path, table)
    else:
        rows = _iter_csv_rows(stream, path, table)
    yield from ((FIELDS, batch) for batch in batches(((row, _weight(row)) for row in rows), size))


def _weight(row: Mapping[str, str] | str) -> int:
    return 100 + (0 if isinstance(row, str) else len(row.get("Body", "")))


def _iter_xml_blocks(begun: bytes, stream: Any, path: Path, size: int, table: str) -> Iterator[bytes]:
    """The text of whole rows. Only a row can begin with "<row", for in a value "<" is spelled otherwise."""
    held = begun
    while more := stream.read(size):
        held += more.translate(None, CONTROLS)
        if len(held) < size:
            continue
        end = held.rfind(ROW)
        if end > 0:
            yield held[:end]
            held = held[end:]
        elif len(held) > 4 * max(size, LONGEST_ROW):
            raise InputError(
                f"{path} is damaged or not a Posts.xml (a row of more than {LONGEST_ROW >> 20} MB): fetch or unpack it again."
            )
    end = held.rfind(f"</{table}>".encode())
    if end < 0 or held[end:].strip() != f"</{table}>".encode():
        raise InputError(
            f"{path} is damaged, truncated or not a Posts.xml (it ends before </{table}>): fetch or unpack it again."
        )
    yield held[:end]


def _parse_rows(rows: bytes, path: Path) -> Iterator[Mapping[str, str] | str]:
    try:
        found = _parse_tree(rows)
    except etree.XMLSyntaxError:  # one bad row is enough
        for row in rows.split(ROW)[1:]:
            yield from _parse_row(ROW + row, path)
    else:
        yield from _iter_attributes(found, path)


def _parse_row(row: bytes, path: Path) -> Iterator[Mapping[str, str] | str]:
    try:
        try:
            found = _parse_tree(row)
        except etree.XMLSyntaxError:
            found = _parse_tree(repair(row))
    except etree.XMLSyntaxError:
        yield NOT_XML
    except UnicodeDecodeError:
        yield NOT_UTF_8
    else:
        yield from _iter_attributes(found, path)


def _parse_tree(rows: bytes) -> "etree._Element":
    # Without huge_tree libxml2 refuses attributes above 10 MB; a text of its own has no entities but XML's.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, collect_ids=False, encoding="utf-8")
    return etree.fromstring(b"<rows>%b</rows>" % rows, parser)


def _iter_attributes(rows: "etree._Element", path: Path) -> Iterator[Mapping[str, str]]:
    for row in rows:
        if row.tag == "row":
            attributes: Any = row.attrib
            yield dict(attributes)
        elif isinstance(row.tag, str):
            raise InputError(NOT_POSTS.format(path))


class _Prefixed:
    """A stream whose beginning has been read."""

    def __init__(self, begun: bytes, rest: Any) -> None:
        self.begun, self.rest = begun, rest

    def read(self, size: int = -1) -> bytes:
        begun, self.begun = self.begun, b""
        more: bytes = begun or self.rest.read(size)
        return more


def _iter_unusual_xml_rows(stream: _Prefixed, path: Path, table: str) -> Iterator[Mapping[str, str]]:
    """Rows of XML that is not written as a dump is, with declarations before the rows; damaged, it is refused as a whole."""
    # Without huge_tree libxml2 refuses entity bombs and attributes above 10 MB; a dump of any length passes, for rows are freed as they go.
    options: Any = {"resolve_entities": False, "no_network": True, "collect_ids": False, "encoding": "utf-8"}
    context = etree.iterparse(stream, events=("end",), tag="row", **options)
    for _, row in context:
        parent = row.getparent()
        if parent is None or parent.tag != table:
            break
        yield dict(row.attrib)
        row.clear(keep_tail=False)
        while row.getprevious() is not None:
            del parent[0]
    else:
        if context.root is not None and context.root.tag == table:
            return
    raise InputError(NOT_POSTS.format(path))


def _iter_csv_rows(
    stream: "io.BufferedReader[Any]", path: Path, table: str
) -> Iterator[Mapping[str, str] | str]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than some posts
    clean = io.BufferedReader(WithoutControls(stream), blocks.READ_BYTES)
    delimiter = find_delimiter(clean.peek(HEAD))
    text = io.TextIOWrapper(clean, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(reader, [])
    columns, width = tuple(find_columns(header, table, path).items()), len(header)
    for row in reader:
        if row:  # an empty line is none
            yield read_fields(row, width, columns)


def _parse_post(fields: Mapping[str, str] | str) -> Post | Unreadable | str:
    """The post in a row's fields; else of which other kind it is, or the reason why it cannot be read."""
    if isinstance(fields, str):
        return Unreadable(fields)
    kind = fields.get("PostTypeId", "").removesuffix(".0")
    if kind not in (QUESTION, ANSWER):
        return OTHER_TYPES if kind.isdecimal() else Unreadable(_unreadable_reason("PostTypeId", kind))
    author = fields.get("OwnerUserId", "").removesuffix(".0")
    try:
        return Post(
            id=_parse_integer(fields, "Id", low=1),
            parent=_parse_integer(fields, "ParentId", low=1) if kind == ANSWER else 0,
            accepted=_parse_integer(fields, "AcceptedAnswerId")
            if kind == QUESTION and fields.get("AcceptedAnswerId")
            else 0,
            votes=_parse_integer(fields, "Score", low=-(2**31), high=2**31),
            created=fields.get("CreationDate", ""),
            title=" ".join(fields.get("Title", "").split()),
            body=fields.get("Body", ""),
            author_id=author if author.removeprefix("-").isdecimal() else "",  # -1 is the site itself
            author_name=fields.get("OwnerDisplayName", ""),
            licence=fields.get("ContentLicense", ""),
        )
    except ValueError as error:
        return Unreadable(str(error))


def _parse_integer(fields: Mapping[str, str], column: str, *, low: int = 0, high: int = 2**63) -> int:
    text = fields.get(column, "")
    try:
        value = int(text.removesuffix(".0"))
    except ValueError:
        raise ValueError(_unreadable_reason(column, text)) from None
    if not low <= value < high:
        raise ValueError(f"rows whose {column} is out of range")
    return value


def _unreadable_reason(column: str, text: str) -> str:
    return f"rows whose {column} is no whole number" if text.strip() else f"rows without {column}"


def _one_line(text: str | None) -> str:
    return CONTROL.sub(" ", text or "")[:120].strip()
