"""Close the home to other users of the machine: it holds a login, private texts and models."""

import os
import stat
from contextlib import suppress
from pathlib import Path

OPEN = 0o077  # what a group and others may do
# what alignflow creates in a home, for a home that holds other files as well
FOLDERS = (
    "checks",
    "digests",
    "fetched",
    "locks",
    "logs",
    "mlartifacts",
    "objects",
    "partial",
    "prefect",
    "quarantine",
    "runs",
)
FILES = ("credentials.json", "mlflow-auth.db", "mlflow-auth.ini", "mlflow.db", "report.html", "up.json")


def restrict_to_owner(home: Path) -> None:
    """Create the home and make it accessible to its owner only, with all files in it and all later ones."""
    os.umask(OPEN)
    home.mkdir(parents=True, exist_ok=True)
    if _is_for_this_alone(home):
        _close(home)
        names = [path.name for path in home.iterdir()]
    else:
        names = [*FOLDERS, *FILES]
    for path in (home / name for name in names):
        if path.exists() and _close(path) and path.is_dir():
            _close_below(path)


def _is_for_this_alone(home: Path) -> bool:
    """Return False for /tmp, the user's own folder and the like, which hold files of others as well."""
    works_in = {Path.cwd(), *Path.cwd().parents, Path.home(), *Path.home().parents}
    return home not in works_in and not home.stat().st_mode & stat.S_ISVTX


def _close_below(folder: Path) -> None:
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _close(Path(place, name))


def _close(path: Path) -> bool:
    """Remove the permissions of others; return whether there were any.

    Links, and what another user owns, stay as they are.
    """
    try:
        about = path.lstat()
    except FileNotFoundError:  # a program that is at work in the home has removed it
        return False
    if stat.S_ISLNK(about.st_mode) or about.st_uid != os.geteuid() or not about.st_mode & OPEN:
        return False
    with suppress(FileNotFoundError):
        path.chmod(stat.S_IMODE(about.st_mode) & ~OPEN)
    return True
