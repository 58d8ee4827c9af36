"""Define the exceptions of stages, and the sentences that a user reads for them.

Exception
    InputError      bad input: one sentence that says what is wrong and what to do, exit status 2
        DiskFailure     a disk refused a write: full, read-only, over a quota or a limit
    StageFailed     a program failed for another reason, exit status 1
        StageCrashed    it was killed by a signal and can resume from its checkpoint
        InputMissing    an input artifact is gone from this machine and from MLflow
"""

import errno
import gzip
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Bad input: the message is one clear sentence that says what is wrong and what to do."""


class DiskFailure(InputError):
    """A file could not be written.

    Finished work is kept: with free space, the same command resumes from it.
    """


class StageFailed(Exception):
    """A stage's program failed, and not because of its input."""


class StageCrashed(StageFailed):
    """The program was killed by a signal and can resume from its checkpoint."""


class InputMissing(StageFailed):
    """Inputs are neither on this machine nor intact in MLflow.

    The process that orchestrates the run builds them again.
    """

    def __init__(self, names: list[str]) -> None:
        sentence = "Run it again to have its inputs built again; neither on this machine nor intact in MLflow"
        super().__init__(f"{sentence}: {', '.join(names)}")


@contextmanager
def refusing_broken_gzip(path: Path) -> Iterator[None]:
    """Raise InputError for what reading a damaged or truncated gzip file raises."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged or truncated gzip file ({error}): fetch it again.") from error


SQLITE_FULL = 13
REFUSED_WRITES = {
    errno.ENOSPC: "The disk under {mount} is full: free some space",
    errno.EDQUOT: "The disk quota under {mount} is used up: free some space, or have the quota raised,",
    errno.EFBIG: "A file under {place} has reached the largest size allowed: raise the limit (ulimit -f)",
    errno.EROFS: "The file system {mount} is read-only: make it writable",
}
CUT_WRITE = (
    "A file under {place} could not be written completely: free some space, or raise the limit of file sizes "
    "(ulimit -f),"
)
RESUME = " and run the same command again; it goes on from where it stopped."
PROBE_BYTES = 2**16


def disk_failure(error: BaseException, place: Path) -> DiskFailure | None:
    """Return the exception for the user if ``error`` or its cause is a write that the disk of ``place``
    refused.
    """
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if isinstance(cause, DiskFailure):
            return cause
        if sentence := _refused_write(cause):
            return DiskFailure(sentence.format(place=place, mount=_mount_point(place)) + RESUME)
        seen.append(cause)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _mount_point(place: Path) -> Path:
    """Return the mount point of the file system of ``place``, which may not exist yet."""
    return next(folder for folder in (place.absolute(), *place.absolute().parents) if os.path.ismount(folder))


def _refused_write(error: BaseException) -> str | None:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if getattr(error, "sqlite_errorcode", None) == SQLITE_FULL:
        number = errno.ENOSPC
    elif found := re.search(
        r"\(os error (\d+)\)", text
    ):  # safetensors and tokenizers: an I/O error of Rust, as text
        number = int(found[1])
    elif isinstance(error, OSError) and re.search(
        r"^Not enough free space to write|^\d+ requested and \d+ written", text
    ):  # numpy, without a number
        return CUT_WRITE
    return REFUSED_WRITES.get(number) if number is not None else None


def probe_disk(folder: Path) -> DiskFailure | None:
    """Write a small file into ``folder`` and remove it.

    Return the exception for the user if the disk refuses it.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return disk_failure(error, folder)
    return None


@contextmanager
def refusing_disk_failures(place: Path) -> Iterator[None]:
    """Raise DiskFailure for what is raised when the disk of ``place`` refuses a write."""
    try:
        yield
    except Exception as error:
        if (failure := disk_failure(error, place)) and failure is not error:
            raise failure from error
        raise
