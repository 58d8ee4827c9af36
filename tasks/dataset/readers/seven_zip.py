"""Read one file of a 7z archive as a stream: it is decompressed while it is read, and never written to disk.

In memory is one decompressed block of the archive (1 MiB); py7zr reads at most 128 MB of the archive at a
time.
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
    """Return whether the file is an archive with a member called ``name``."""
    try:
        with py7zr.SevenZipFile(path) as archive:
            return any(PurePosixPath(one.filename).name == name for one in archive.list())
    except Exception:  # reading the file raises the helpful error
        return False


@contextmanager
def open_member(file: BinaryIO, path: Path, name: str) -> Iterator[BinaryIO]:
    """Open the only member called ``name``, in any folder of the archive.

    Raises InputError if there is none, if there are several, or if the archive is damaged.
    """
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
            f"{path} holds {len(members) or 'no'} {name}: give the archive of one site's posts, or the "
            f"{name} itself."
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
            stream.close()  # ends the thread that writes
            thread.join()
            if failures:  # a truncated text is only a consequence of the damaged archive
                raise _damaged_error(path, failures[0]) from error
            raise
    thread.join()
    if failures:
        raise _damaged_error(path, failures[0])


def _extract(archive: py7zr.SevenZipFile, target: str, writing: int, failures: list[Exception]) -> None:
    with suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
        try:
            archive.extract(targets=[target], factory=_PipeFactory(pipe))
        except BrokenPipeError:  # the reader has stopped
            pass
        except Exception as error:
            failures.append(error)


class _PipeFactory(WriterFactory):
    def __init__(self, pipe: BinaryIO) -> None:
        self.pipe = pipe

    def create(self, filename: str) -> Py7zIO:  # noqa: ARG002 - there is only one
        return _PipeWriter(self.pipe)


class _PipeWriter(Py7zIO):
    """File object that py7zr writes to."""

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
        f"{path} is a damaged, encrypted or unknown kind of 7z archive ({reason or type(error).__name__}): "
        "fetch it again, or unpack it."
    )
