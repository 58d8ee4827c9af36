"""Write files atomically.

The content goes to a temporary file beside the target, which then gets the target's name in one step. Readers
find the old file or the new one, never a part; a killed process changes nothing; of concurrent writers, on
one machine or on several, the last one wins.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PRIVATE, PUBLIC = 0o600, 0o666  # permissions of a new file; the umask takes away from them


@contextmanager
def replacing(path: Path, *, sync: bool = False, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary path to write to, which replaces ``path`` when the block ends without an exception.

    With ``sync`` the content is flushed to the disk first, so that a power failure, too, leaves the old file
    or the new one. With ``keep_existing`` a file that is at ``path`` by then stays, and the new one is
    dropped.
    """
    writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    temporary = path.with_name(f".{path.name}.{writer}.new")
    temporary.unlink(missing_ok=True)  # of a killed process with the same id
    try:
        yield temporary
        if sync:
            sync_path(temporary)
        if keep_existing:
            with suppress(FileExistsError):
                os.link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str, *, private: bool = False) -> None:
    """Replace a text file and flush it to the disk; other users can never read a ``private`` one."""
    mode = PRIVATE if private else PUBLIC
    with replacing(path, sync=True) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)


def sync_path(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush every file below ``folder`` to the disk, and the folder itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_path(path)
    sync_path(folder)
