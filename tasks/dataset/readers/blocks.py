"""Define blocks: parts of a source that any worker can read independently of the others."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tasks.system.files import replacing

BLOCK_BYTES = 2**24  # of text in a block
READ_BYTES = 2**18  # of a file, read at a time


class Block(NamedTuple):
    """Consecutive rows of one file."""

    path: Path
    file: str  # name to show in places of rows
    form: str  # says which function of the reader parses the content
    content: bytes  # text of the file, or values as JSON
    bytes_read: int  # of the whole source, up to the end of this block
    stored: Path | None = None  # the file that the content was moved to
    is_in_file: bool = False  # whether the content only names the parts of the file that are to be read


def batches(rows: Iterable[tuple[Any, int]], size: int) -> Iterator[list[Any]]:
    """Yield lists of rows of about ``size`` bytes together, from pairs of a row and its size."""
    batch: list[Any] = []
    batch_size = 0
    for row, row_size in rows:
        batch.append(row)
        batch_size += row_size
        if batch_size >= size:
            yield batch
            batch, batch_size = [], 0
    if batch:
        yield batch


def display_name(path: Path, root: Path) -> str:
    """Return the name to show for a file of the source ``root``; bytes that are not UTF-8 become "?"."""
    name = path.name if path == root else path.relative_to(root).as_posix()
    return name.encode("utf-8", "replace").decode()


def store_content(block: Block, path: Path) -> Block:
    """Return the block with its content moved to a file, for a worker in another process."""
    with replacing(path) as new:
        new.write_bytes(block.content)
    return block._replace(content=b"", stored=path)


def load_content(block: Block) -> bytes:
    """Return the block's content, from memory or disk."""
    return block.stored.read_bytes() if block.stored else block.content


def to_json(values: list[Any]) -> bytes:
    """Return values as the content of a block."""
    return json.dumps(values).encode()
