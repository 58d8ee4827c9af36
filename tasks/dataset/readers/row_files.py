"""Rows of JSON lines and JSON lists, both also gzipped, of parquet and Arrow files: a file, or all such files of a folder.

A row that cannot be read is told and left out; a file that breaks off is refused, for nobody knows what it lacks. Memory stays flat whatever the
size of a file; only a row's own size counts, and one above MAX_ROW bytes is left out.
"""

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from tasks.dataset.readers import blocks, columnar_files
from tasks.dataset.readers.blocks import Block, batches
from tasks.dataset.readers.columnar_files import ARROW_FILE, ARROW_STREAM, PARQUET
from tasks.dataset.readers.quarantine import Place, Quarantine, quote
from tasks.system.errors import InputError, refusing_broken_gzip

MAX_ROW = 2**24
CHUNK = 2**16
ENDINGS = (".jsonl", ".json", ".parquet", ".arrow", ".jsonl.gz", ".json.gz")
METADATA_FILES = {
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
}  # files about a data set, not of it
BETWEEN = frozenset(" \t\r\n,")
GZIP = b"\x1f\x8b"
ESCAPE = "\\u"
GROUPS, RECORDS, LINES, VALUES = "groups", "records", "lines", "values"  # forms of blocks
TOO_LONG = b"\n"  # stands for a line that is; no other is empty
NOT_AN_OBJECT = "rows that are no objects"
HINT = "give JSON lines, a JSON list, parquet or a folder of datasets.save_to_disk"


class Row(NamedTuple):
    place: Place
    fields: dict[str, Any]


def read_rows(path: Path, bad: Quarantine, watch: Callable[[int, int], None] | None = None) -> Iterator[Row]:
    """Every row that is an object, in the order of the files' names. ``watch(read, size)`` is called after each block, in bytes.

    Raises InputError: nothing there, no such file among what is there, a damaged one, or another format.
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
            watch(block.read, size)


def iter_blocks(path: Path, columns: frozenset[str] = frozenset()) -> Iterator[Block]:
    """The files, in the order of their names, in blocks of about ``blocks.SIZE`` bytes of text; see ``part``. Raises InputError."""
    before = 0
    for file in split_by_columns(path, columns)[0]:
        shown, whole = blocks.display_name(file, path), file.stat().st_size
        for form, content, offset in _iter_pieces(file, blocks.BLOCK_BYTES):
            yield Block(file, shown, form, content, before + min(offset, whole))
        before += whole


def read_block(block: Block) -> Iterator[dict[str, Any] | str]:
    """Every row of a block, or the reason why it is none. Raises InputError."""
    with _refusing_damaged_files(block.path):
        found = blocks.load_content(block)
        for value in _iter_values(block, found):
            yield value if isinstance(value, dict | str) else NOT_AN_OBJECT


def _iter_values(block: Block, found: Any) -> Iterator[Any]:
    if block.form == GROUPS:
        return columnar_files.read_row_groups(block.path, found)
    if block.form == RECORDS:
        return columnar_files.read_record_batches(block.path, found)
    return map(partial(_parse_line, Decoder()), found) if block.form == LINES else iter(found)


def list_files(path: Path) -> list[Path]:
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
    saved = {
        folder: _saved_by_datasets(folder)
        for folder in {file.parent for file in found if file.suffix == ".arrow"}
    }
    found = [
        file
        for file in found
        if not (names := saved.get(file.parent)) or file.suffix != ".arrow" or file.name in names
    ]
    if not found:
        raise InputError(f"{path} holds no file that ends in {', '.join(ENDINGS)}: {HINT}.")
    return found


def _is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a name below the folder begins with a dot: .git, .ipynb_checkpoints, and what macOS puts beside a file (._rows.jsonl)."""
    return any(name.startswith(".") for name in file.relative_to(folder).parts)


def _saved_by_datasets(folder: Path) -> set[str]:
    """Return the names of the files that datasets.save_to_disk wrote: its caches lie beside them. No names: it did not write this folder."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return set()
    files = state.get("_data_files") if isinstance(state, dict) else None
    return (
        {str(file["filename"]) for file in files or [] if isinstance(file, dict) and "filename" in file}
        if isinstance(files, list)
        else set()
    )


def split_by_columns(path: Path, columns: frozenset[str]) -> tuple[list[Path], list[Path]]:
    """Return the files whose rows have these columns, and the others: what lies beside the rows of a published set. Raises InputError.

    A file whose columns cannot be seen is taken, and so are all if none has the columns: reading them says what is wrong.
    """
    files = list_files(path)
    if not columns or len(files) == 1:
        return files, []
    others = [file for file in files if (names := _column_names(file)) and not columns <= names]
    return (
        ([file for file in files if file not in others], others) if len(others) < len(files) else (files, [])
    )


def _column_names(file: Path) -> set[str]:
    """Return the columns of the first rows; none if no row can be read."""
    with file.open("rb") as stream:
        head = stream.read(4)
    with _refusing_damaged_files(file):
        if head in (PARQUET, ARROW_FILE, ARROW_STREAM):
            return set(columnar_files.column_names(file, head))
    form, content, _ = next(_iter_pieces(file, CHUNK), (LINES, [], 0))
    rows = read_block(Block(file, file.name, form, content, 0))
    return {name for row in rows if isinstance(row, dict) for name in row}


def _iter_pieces(path: Path, size: int) -> Iterator[tuple[str, Any, int]]:
    """(form, content, bytes of the file read) of each block."""
    with path.open("rb") as file, _refusing_damaged_files(path):
        head = file.peek(4)[:4]
        if head == PARQUET:
            yield from ((GROUPS, groups, read) for groups, read in columnar_files.iter_row_groups(path, size))
            return
        if head in (ARROW_FILE, ARROW_STREAM):
            yield from (
                (RECORDS, numbers, read) for numbers, read in columnar_files.iter_record_batches(path, size)
            )
            return
        stream = io.BufferedReader(gzip.GzipFile(fileobj=file)) if head.startswith(GZIP) else file
        start = stream.peek(CHUNK)[:CHUNK].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if start not in (b"{", b"["):
            raise InputError(
                f"{path} is empty: fetch or export it again."
                if not start
                else f"{path} is in another format: {HINT}."
            )
        if start == b"{":
            yield from (
                (LINES, batch, file.tell())
                for batch in batches(((line, len(line)) for line in _iter_lines(stream)), size)
            )
        else:
            yield from ((VALUES, batch, file.tell()) for batch in batches(_iter_list(stream, path), size))


@contextmanager
def _refusing_damaged_files(path: Path) -> Iterator[None]:
    try:
        with refusing_broken_gzip(path):
            yield
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is damaged or truncated ({str(error).splitlines()[0][:120]}): fetch it again."
        ) from error


def _iter_lines(stream: "io.BufferedReader[Any]") -> Iterator[bytes]:
    while line := stream.readline(MAX_ROW):
        if len(line) == MAX_ROW and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                pass
            yield TOO_LONG
        elif line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield line


class Decoder:
    """A decoder of JSON that tells of a name that an object has twice: which of the values is meant nobody knows."""

    def __init__(self) -> None:
        self.repeated = ""  # such a name of the last value, if there is one
        self._json = json.JSONDecoder(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            self.repeated = quote(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return fields

    def decode(self, text: str) -> Any:
        """Return the value. Raises ValueError or RecursionError."""
        self.repeated = ""
        return self._json.decode(text)

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """Return the value that begins at ``start``, and where it ends."""
        self.repeated = ""
        return self._json.raw_decode(text, start)

    def checked(self, value: Any) -> Any:
        """Return the last value if it is a row, else the reason why it is none."""
        if not isinstance(value, dict):
            return NOT_AN_OBJECT
        return f"rows that name {self.repeated} twice" if self.repeated else value


def _parse_line(decoder: Decoder, line: bytes) -> Any:
    if line == TOO_LONG:
        return "rows that are too long"
    try:
        value = decoder.checked(decoder.decode(line.decode("utf-8-sig")))
        return replace_lone_surrogates(value) if ESCAPE.encode() in line else value
    except (ValueError, RecursionError):
        return "rows that are not JSON"


def replace_lone_surrogates(value: Any) -> Any:
    """The same value; halves of characters, which JSON's escapes can spell and nothing else can hold, become U+FFFD."""
    if isinstance(value, str):
        return (
            value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        )
    if isinstance(value, dict):
        return {
            replace_lone_surrogates(name): replace_lone_surrogates(inner) for name, inner in value.items()
        }
    return [replace_lone_surrogates(inner) for inner in value] if isinstance(value, list) else value


def _iter_list(stream: "io.BufferedReader[Any]", path: Path) -> Iterator[tuple[Any, int]]:
    """(element, its length) of one JSON list, decoded as it is read."""
    decoder, reader = Decoder(), io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        text = reader.read(CHUNK).lstrip()
        at, wanted, ended = 1, CHUNK, False
        while True:
            while text[at : at + 1] in BETWEEN:
                at += 1
            if text.startswith("]", at):
                return
            try:
                element, end = decoder.decode_at(text, at)
                if end == len(text) and not ended:
                    raise ValueError("a number may go on")
            except ValueError:
                if ended or len(text) - at > 2 * MAX_ROW:
                    raise InputError(
                        f"{path} is a damaged or truncated JSON list: export or fetch it again."
                    ) from None
                more = reader.read(wanted)
                text, at, wanted, ended = text[at:] + more, 0, 2 * wanted, not more
                continue
            element = decoder.checked(element)
            yield replace_lone_surrogates(element) if text.find(ESCAPE, at, end) >= 0 else element, end - at
            at, wanted = end, CHUNK
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a JSON list in UTF-8 ({type(error).__name__}): export it again."
        ) from error
    finally:
        reader.detach()
