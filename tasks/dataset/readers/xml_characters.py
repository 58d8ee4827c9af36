"""Repair XML with characters that the standard forbids and real dumps contain.

These are control characters, lone surrogates, and references to either.
"""

import codecs
import io
import re
from pathlib import Path
from typing import Any

from tasks.system.errors import InputError

CONTROLS = bytes(
    [*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F]
)  # none of these bytes is part of a longer UTF-8 character
REFERENCE = re.compile(r"&#(?:[xX]0*([0-9a-fA-F]{1,8})|0*([0-9]{1,9}));")
NO_CHARACTERS = re.compile("[\ufffe\uffff]")

DECLARED = re.compile(rb"\s*<\?xml[^>]*\sencoding\s*=\s*[\"']([\w.:-]+)[\"']")
UTF_16 = {b"\xff\xfe<\0": "utf-16", b"\xfe\xff\0<": "utf-16", b"<\0?\0": "utf-16-le", b"\0<\0?": "utf-16-be"}


class WithoutControls(io.RawIOBase):
    """A stream that leaves out the control characters of another, for readers that need a file object."""

    def __init__(self, stream: "io.BufferedReader[io.RawIOBase]") -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override] # any writable buffer
        while more := self.stream.read1(len(buffer)):
            if kept := more.translate(None, CONTROLS):
                buffer[: len(kept)] = kept
                return len(kept)
        return 0


def repair(xml: bytes) -> bytes:
    """Return UTF-8 text without references to characters that XML 1.0 does not allow.

    Raises UnicodeDecodeError.

    Two references to the surrogates of one character (&#xD83D;&#xDE00;) become that character.
    """
    text = NO_CHARACTERS.sub("", REFERENCE.sub(_repair_reference, xml.decode()))
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore").encode()


def _repair_reference(reference: re.Match[str]) -> str:
    code = int(reference[1], 16) if reference[1] else int(reference[2])
    if 0xD800 <= code < 0xE000:
        return chr(code)
    allowed = code in (0x9, 0xA, 0xD) or 0x20 <= code < 0xFFFE or 0x10000 <= code < 0x110000
    return reference[0] if allowed else ""


def detect_utf_16(head: bytes) -> str:
    """Return the UTF-16 encoding of XML that begins with ``head``, "" if it is in no UTF-16."""
    return next((name for magic, name in UTF_16.items() if head.startswith(magic)), "")


def to_utf_8(stream: "io.BufferedReader[Any]", path: Path) -> Any:
    """Return the stream of an XML file converted to UTF-8.

    UTF-16 is detected from the bytes, because some exports in UTF-8 declare UTF-16.
    """
    head = stream.peek(256)
    declared = DECLARED.match(head.removeprefix(codecs.BOM_UTF8))
    encoding = detect_utf_16(head)
    if not encoding and declared and not declared[1].lower().startswith(b"utf-16"):
        encoding = declared[1].decode("latin-1")
    try:
        if not encoding or (not "".encode(encoding) and codecs.lookup(encoding).name in ("utf-8", "ascii")):
            return stream
        return codecs.EncodedFile(stream, "utf-8", encoding, "ignore")
    except (LookupError, UnicodeError) as error:
        raise InputError(
            f"{path} is in an encoding that is not known ({encoding}): convert it to UTF-8."
        ) from error
