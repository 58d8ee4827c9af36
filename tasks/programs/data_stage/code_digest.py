"""Hash the code that makes parts, so that a worker on another machine can tell whether it has the same."""

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of the package tasks
FOLDERS = ("dataset", "programs/data_stage")
# of another version, each may make other texts or leave out other questions
LIBRARIES = ("html-to-markdown", "lxml", "phonenumbers", "publicsuffixlist", "py3langid", "pyarrow", "rensa")


@cache
def code_digest() -> str:
    """Return the digest of the source files of FOLDERS and of the versions of LIBRARIES."""
    digest = hashlib.sha256(repr([*map(version, LIBRARIES)]).encode())
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
