"""The one exception that is the user's to mend: shown as a single sentence, exit status 2."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """Bad input: the message is one clear sentence that says what is wrong and what to do."""


@contextmanager
def refusing_broken_gzip(path: Path) -> Iterator[None]:
    """What reading a damaged or truncated gzip file raises, as InputError."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged or truncated gzip file ({error}): fetch it again.") from error
