"""Parse rows of JSON lines and of JSON lists while they are read.

Memory does not grow with the size of a file, only with that of a row; a row above MAX_ROW bytes is left out.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.dataset.readers.quarantine import quote
from tasks.system.errors import InputError

MAX_ROW = 2**24  # bytes
CHUNK = 2**16  # characters that are read at a time
SEPARATORS = frozenset(" \t\r\n,")
ESCAPE = "\\u"
TOO_LONG = b"\n"  # marks a line above MAX_ROW; other lines are not empty
NOT_AN_OBJECT = "rows that are no objects"


def iter_lines(stream: "io.BufferedReader[Any]") -> Iterator[bytes]:
    """Yield the lines of a file that are not blank; TOO_LONG for a line above MAX_ROW."""
    while line := stream.readline(MAX_ROW):
        if len(line) == MAX_ROW and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                pass
            yield TOO_LONG
        elif line.strip(b" \t\r\n\xef\xbb\xbf"):
            yield line


class Decoder:
    """A JSON decoder that reports a name that repeats in an object, because its value is unclear."""

    def __init__(self) -> None:
        self.repeated = ""  # a repeated name in the last value, if there is one
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
        """Return the value that begins at ``start``, and the index at which it ends."""
        self.repeated = ""
        return self._json.raw_decode(text, start)

    def checked(self, value: Any) -> Any:
        """Return the last value if it is a row, else the reason why it is not."""
        if not isinstance(value, dict):
            return NOT_AN_OBJECT
        return f"rows that name {self.repeated} twice" if self.repeated else value


def parse_line(decoder: Decoder, line: bytes) -> Any:
    """Return the row of a line, or the reason why it is not one."""
    if line == TOO_LONG:
        return "rows that are too long"
    try:
        value = decoder.checked(decoder.decode(line.decode("utf-8-sig")))
        return replace_lone_surrogates(value) if ESCAPE.encode() in line else value
    except (ValueError, RecursionError):
        return "rows that are not JSON"


def replace_lone_surrogates(value: Any) -> Any:
    """Return the value with U+FFFD in place of lone surrogates, which only JSON's escapes can contain."""
    if isinstance(value, str):
        if value.isascii():
            return value
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {replace_lone_surrogates(name): replace_lone_surrogates(v) for name, v in value.items()}
    return [replace_lone_surrogates(inner) for inner in value] if isinstance(value, list) else value


def iter_list(stream: "io.BufferedReader[Any]", path: Path) -> Iterator[tuple[Any, int]]:
    """Yield (element, its length) of one JSON list, decoded while it is read."""
    decoder, reader = Decoder(), io.TextIOWrapper(stream, encoding="utf-8-sig")
    try:
        text = reader.read(CHUNK).lstrip()
        at, wanted, ended = 1, CHUNK, False
        while True:
            while text[at : at + 1] in SEPARATORS:
                at += 1
            if text.startswith("]", at):
                return
            try:
                element, end = decoder.decode_at(text, at)
                if end == len(text) and not ended:
                    raise ValueError("a number may continue")
            except ValueError:
                if ended or len(text) - at > 2 * MAX_ROW:
                    raise InputError(
                        f"{path} is a damaged or truncated JSON list: export or fetch it again."
                    ) from None
                more = reader.read(wanted)
                text, at, wanted, ended = text[at:] + more, 0, 2 * wanted, not more
                continue
            element = decoder.checked(element)
            if text.find(ESCAPE, at, end) >= 0:
                element = replace_lone_surrogates(element)
            yield element, end - at
            at, wanted = end, CHUNK
    except (UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a JSON list in UTF-8 ({type(error).__name__}): export it again."
        ) from error
    finally:
        reader.detach()
