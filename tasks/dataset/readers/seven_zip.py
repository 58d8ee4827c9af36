"""One file of a 7z archive as a stream: decompressed while it is read, and never written to disk.

What is in memory is a block of the archive (1 MiB) decompressed, of which py7zr takes 128 MB at most at a time.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import py7zr
from py7zr.io import Py7zIO, WriterFactory

from tasks.system.errors import InputError


def has_member(path: Path, name: str) -> bool:
    """Whether the file is an archive with a member called ``name``."""
    try:
        with py7zr.SevenZipFile(path) as archive:
            return any(PurePosixPath(one.filename).name == name for one in archive.list())
    except Exception:  # whoever reads it will say what is wrong with it
        return False


@contextmanager
def open_member(file: BinaryIO, path: Path, name: str) -> Iterator[BinaryIO]:
    """The bytes of the only member called ``name``, in whichever folder of the archive. InputError: none, several, or a damaged archive."""
    try:
        archive = py7zr.SevenZipFile(file)
        members = [
            one.filename
            for one in archive.list()
            if not one.is_directory and PurePosixPath(one.filename).name == name
        ]
    except Exception as error:
        raise _damaged_error(path, error) from error
    if len(members) != 1:
        raise InputError(
            f"{path} holds {len(members) or 'no'} {name}: give the archive of one site's posts, or the {name} itself."
        )
    reading, writing = os.pipe()
    failures: list[Exception] = []
    thread = threading.Thread(target=_extract, args=(archive, members[0], writing, failures), daemon=True)
    with os.fdopen(reading, "rb", buffering=2**20) as stream:
        thread.start()
        try:
            yield stream
        except GeneratorExit:
            raise
        except BaseException as error:
            stream.close()  # the other end gives up
            thread.join()
            if failures:  # what broke off is the archive; that the text inside is cut follows from it
                raise _damaged_error(path, failures[0]) from error
            raise
    thread.join()
    if failures:
        raise _damaged_error(path, failures[0])


def _extract(archive: py7zr.SevenZipFile, target: str, writing: int, failures: list[Exception]) -> None:
    with suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
        try:
            archive.extract(targets=[target], factory=_PipeFactory(pipe))
        except BrokenPipeError:  # nobody reads on
            pass
        except Exception as error:
            failures.append(error)


class _PipeFactory(WriterFactory):
    def __init__(self, pipe: BinaryIO) -> None:
        self.pipe = pipe

    def create(self, filename: str) -> Py7zIO:  # noqa: ARG002 - there is but one
        return _PipeWriter(self.pipe)


class _PipeWriter(Py7zIO):
    """What py7zr takes for a file."""

    def __init__(self, pipe: BinaryIO) -> None:
        self.pipe = pipe
        self.written = 0

    def write(self, s: bytes | bytearray) -> int:
        self.pipe.write(s)
        self.written += len(s)
        return len(s)

    def read(self, size: int | None = None) -> bytes:  # noqa: ARG002
        return b""

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: ARG002
        return offset

    def flush(self) -> None:
        pass

    def size(self) -> int:
        return self.written


def _damaged_error(path: Path, error: Exception) -> InputError:
    reason = ""
    with suppress(Exception):
        reason = " ".join(str(error).split())[:120]
    return InputError(
        f"{path} is a damaged, encrypted or unknown kind of 7z archive ({reason or type(error).__name__}): fetch it again, or unpack it."
    )
