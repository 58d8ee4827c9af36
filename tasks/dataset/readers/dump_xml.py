"""Read the rows of a dump's XML: find blocks of whole rows, and parse them, one by one if a row is not valid.

XML that is not written as a dump is read by a general parser, which refuses a damaged file as a whole.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lxml import etree

from tasks.dataset.readers.csv_columns import NOT_UTF_8
from tasks.dataset.readers.xml_characters import CONTROLS, repair
from tasks.system.errors import InputError

NOT_XML = "rows that are not well-formed XML"
ROW, HEAD = b"<row", 2**16
# how a dump begins
PLAIN = re.compile(
    rb"(\xef\xbb\xbf)?\s*(?:<\?xml[^>]*\?>)?(?:\s|<!--.*?-->)*<(?P<table>\w+)(?:\s[^<>]*)?>(?:\s|<!--.*?-->)*\Z",
    re.DOTALL,
)
LONGEST_ROW = 2**25  # bytes
NOT_POSTS = "{} is XML but not a Posts.xml (no <row>s under <posts>): give the Posts.xml of a dump."


def is_plain(head: bytes, table: str) -> bool:
    """Return whether a file that begins with ``head`` is written as a dump of the table."""
    match = PLAIN.match(head[: head.find(ROW)] if ROW in head else b"")
    return match is not None and match["table"] == table.encode()


def iter_row_blocks(head: bytes, stream: Any, path: Path, size: int, table: str) -> Iterator[bytes]:
    """Yield the text of whole rows, in parts of about ``size`` bytes. Raises InputError.

    ``head`` is the part of the stream that has been read. Only a row can begin with "<row", because "<" is
    escaped in values.
    """
    text = head[head.find(ROW) :]
    while more := stream.read(size):
        text += more.translate(None, CONTROLS)
        if len(text) < size:
            continue
        end = text.rfind(ROW)
        if end > 0:
            yield text[:end]
            text = text[end:]
        elif len(text) > 4 * max(size, LONGEST_ROW):
            raise InputError(
                f"{path} is damaged or not a Posts.xml (a row of more than {LONGEST_ROW >> 20} MB): "
                "fetch or unpack it again."
            )
    closing = f"</{table}>"
    end = text.rfind(closing.encode())
    if end < 0 or text[end:].strip() != closing.encode():
        raise InputError(
            f"{path} is damaged, truncated or not a Posts.xml (it ends before {closing}): "
            "fetch or unpack it again."
        )
    yield text[:end]


def parse_rows(rows: bytes, path: Path) -> Iterator[Mapping[str, str] | str]:
    """Yield the attributes of each row; instead of a row that cannot be read, the reason."""
    try:
        tree = _parse_tree(rows)
    except etree.XMLSyntaxError:  # one invalid row is enough
        for row in rows.split(ROW)[1:]:
            yield from _parse_row(ROW + row, path)
    else:
        yield from _iter_attributes(tree, path)


def _parse_row(row: bytes, path: Path) -> Iterator[Mapping[str, str] | str]:
    try:
        try:
            tree = _parse_tree(row)
        except etree.XMLSyntaxError:
            tree = _parse_tree(repair(row))
    except etree.XMLSyntaxError:
        yield NOT_XML
    except UnicodeDecodeError:
        yield NOT_UTF_8
    else:
        yield from _iter_attributes(tree, path)


def _parse_tree(rows: bytes) -> "etree._Element":
    # Without huge_tree libxml2 refuses attributes above 10 MB; a text of its own has no entities but XML's.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, collect_ids=False, encoding="utf-8")
    return etree.fromstring(b"<rows>%b</rows>" % rows, parser)


def _iter_attributes(rows: "etree._Element", path: Path) -> Iterator[Mapping[str, str]]:
    for row in rows:
        if row.tag == "row":
            attributes: Any = row.attrib  # a view: only the attributes that are asked for become strings
            yield attributes
        elif isinstance(row.tag, str):
            raise InputError(NOT_POSTS.format(path))


class _PrefixedStream:
    """A stream whose beginning has already been read."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self.head, self.rest = head, rest

    def read(self, size: int = -1) -> bytes:
        head, self.head = self.head, b""
        content: bytes = head or self.rest.read(size)
        return content


def iter_unusual_rows(head: bytes, rest: Any, path: Path, table: str) -> Iterator[Mapping[str, str]]:
    """Yield the rows of XML that is not written as a dump, such as with declarations before the rows.

    Raises InputError for a damaged file.
    """
    # Without huge_tree libxml2 refuses entity bombs and attributes above 10 MB; a dump of any length passes,
    # because rows are freed once they are read.
    options: Any = {"resolve_entities": False, "no_network": True, "collect_ids": False, "encoding": "utf-8"}
    context = etree.iterparse(_PrefixedStream(head, rest), events=("end",), tag="row", **options)
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
