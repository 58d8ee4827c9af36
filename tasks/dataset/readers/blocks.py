"""Pieces of a source that can be read apart from each other, by whichever process is free."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tasks.system.files import replacing

BLOCK_BYTES = 2**24  # bytes of text in a block
READ_BYTES = 2**18  # bytes of a file that are read at a time


class Block(NamedTuple):
    """Rows of one file that follow each other."""

    path: Path
    file: str  # what places call it
    form: str  # which of the reader's ways to read the content
    content: Any  # or, when it is laid on disk, the name of its file
    read: int  # bytes of the whole source that are read when this block is
    laid: Literal["", "bytes", "lines", "values"] = ""


def batches(rows: Iterable[tuple[Any, int]], size: int) -> Iterator[list[Any]]:
    """Lists of rows of about ``size`` bytes; a row comes with its own size."""
    batch: list[Any] = []
    held = 0
    for row, weight in rows:
        batch.append(row)
        held += weight
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def display_name(path: Path, root: Path) -> str:
    """What places call a file of the source ``root``; bytes that are no UTF-8 are shown as ?."""
    name = path.name if path == root else path.relative_to(root).as_posix()
    return name.encode("utf-8", "replace").decode()


def write_content(block: Block, path: Path) -> Block:
    """The block with its content in a file, for a process that is not handed it."""
    if isinstance(block.content, bytes):
        with replacing(path) as new:
            new.write_bytes(block.content)
        return block._replace(content=str(path), laid="bytes")
    lines = bool(block.content) and isinstance(block.content[0], bytes)
    values = [line.decode("latin-1") for line in block.content] if lines else block.content
    with replacing(path) as new:
        new.write_text(json.dumps(values), encoding="utf-8")
    return block._replace(content=str(path), laid="lines" if lines else "values")


def load_content(block: Block) -> Any:
    """The block's content, wherever it is."""
    if not block.laid:
        return block.content
    path = Path(block.content)
    if block.laid == "bytes":
        return path.read_bytes()
    values = json.loads(path.read_text(encoding="utf-8"))
    return [line.encode("latin-1") for line in values] if block.laid == "lines" else values
