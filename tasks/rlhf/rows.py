"""Rows of JSON lines, JSON lists and parquet files, any of them but the last also gzipped: a file, or all such files of a folder.

A row that cannot be read is told and left out; a file that breaks off is refused, for nobody knows what it lacks. Memory stays flat whatever the
size of a file; only a row's own size counts, and one above MAX_ROW bytes is left out.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.rlhf.quarantine import Place, Quarantine
from tasks.rlhf.refusal import InputError

MAX_ROW = 2**24
CHUNK = 2**16
BATCH = 256  # rows of parquet that are objects at a time
ENDINGS = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
BETWEEN = frozenset(" \t\r\n,")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
ESCAPE = "\\u"
HINT = "give JSON lines, a JSON list or parquet"


class Row(NamedTuple):
    place: Place
    fields: dict[str, Any]


def read_rows(path: Path, bad: Quarantine, watch: Callable[[int, int], None] | None = None) -> Iterator[Row]:
    """Every row that is an object, in the order of the files' names. ``watch(read, size)`` is called now and then, in bytes.

    Raises InputError: nothing there, no such file among what is there, a damaged one, or another format.
    """
    files = files_of(path)
    size, before = sum(file.stat().st_size for file in files), 0
    for file in files:
        shown = file.name if file == path else file.relative_to(path).as_posix()
        for number, (fields, offset) in enumerate(_elements(file), 1):
            bad.rows += 1
            if isinstance(fields, dict):
                yield Row(Place(shown, number), fields)
            else:
                bad(Place(shown, number), fields if isinstance(fields, str) else "rows that are no objects")
            if watch and number % 1000 == 0:
                watch(before + min(offset, file.stat().st_size), size)
        before += file.stat().st_size


def files_of(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist: give a file or a folder of JSON lines or parquet.")
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(ENDINGS) and file.name != "dataset_infos.json")
    if not found:
        raise InputError(f"{path} holds no file that ends in {', '.join(ENDINGS)}: {HINT}.")
    return found


def _elements(path: Path) -> Iterator[tuple[Any, int]]:
    """(object, or the reason why there is none; bytes read) of each row."""
    with path.open("rb") as file:
        head = file.peek(4)[:4]
        try:
            if head == PARQUET:
                yield from _of_parquet(path)
                return
            stream = io.BufferedReader(gzip.GzipFile(fileobj=file)) if head.startswith(GZIP) else file
            start = stream.peek(CHUNK)[:CHUNK].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if start not in (b"{", b"["):
                raise InputError(f"{path} is empty: fetch or export it again." if not start else f"{path} is in another format: {HINT}.")
            elements = _of_list(stream, path) if start == b"[" else _of_lines(stream)
            yield from ((element, file.tell()) for element in elements)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is a damaged or truncated gzip file ({error}): fetch it again.") from error
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged or truncated ({str(error).splitlines()[0][:120]}): fetch it again.") from error


def _of_parquet(path: Path) -> Iterator[tuple[Any, int]]:
    with pq.ParquetFile(path) as table:
        total, done, size = max(table.metadata.num_rows, 1), 0, path.stat().st_size
        for batch in table.iter_batches(batch_size=BATCH):
            for fields in batch.to_pylist():
                done += 1
                yield fields, size * done // total


def _of_lines(stream: "io.BufferedReader[Any]") -> Iterator[Any]:
    while line := stream.readline(MAX_ROW):
        if len(line) == MAX_ROW and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                pass
            yield "rows that are too long"
        elif line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig"))
        return whole(value) if ESCAPE.encode() in line else value
    except (ValueError, RecursionError):
        return "rows that are not JSON"


def whole(value: Any) -> Any:
    """The same value; halves of characters, which JSON's escapes can spell and nothing else can hold, become U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {whole(name): whole(inner) for name, inner in value.items()}
    return [whole(inner) for inner in value] if isinstance(value, list) else value


def _of_list(stream: "io.BufferedReader[Any]", path: Path) -> Iterator[Any]:
    """Elements of one JSON list, decoded as it is read."""
    decoder, reader = json.JSONDecoder(), io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        text = reader.read(CHUNK).lstrip()
        at, wanted, ended = 1, CHUNK, False
        while True:
            while text[at : at + 1] in BETWEEN:
                at += 1
            if text.startswith("]", at):
                return
            try:
                element, end = decoder.raw_decode(text, at)
                if end == len(text) and not ended:
                    raise ValueError("a number may go on")
            except ValueError:
                if ended or len(text) - at > 2 * MAX_ROW:
                    raise InputError(f"{path} is a damaged or truncated JSON list: export or fetch it again.") from None
                more = reader.read(wanted)
                text, at, wanted, ended = text[at:] + more, 0, 2 * wanted, not more
                continue
            yield whole(element) if text.find(ESCAPE, at, end) >= 0 else element
            at, wanted = end, CHUNK
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON list in UTF-8 ({type(error).__name__}): export it again.") from error
    finally:
        reader.detach()
