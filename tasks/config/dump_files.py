"""Find the dumps among a source's files, the site of each dump, and the file with the site's users."""

import os
import re
from pathlib import Path

from tasks.config.sections.sources import DUMPS
from tasks.system.errors import InputError

DUMP_ENDINGS = f"{', '.join(DUMPS[:-1])} or {DUMPS[-1]}"
UNKNOWN_SITE = "stackexchange.com"  # if neither a file's name nor source.site says which
OTHER_TABLES = re.compile(
    r"(?:^|-)(?:Badges|Comments|PostHistory|PostLinks|Tags|Users|Votes)\.7z$", re.IGNORECASE
)  # the other archives of a site that is published in several
TABLE = re.compile(r"Posts\.(?:7z|(?:xml|csv)(?:\.gz)?)$", re.IGNORECASE)
ENDING = re.compile(r"[-_. ]?(?:Posts)?\.(?:7z|(?:xml|csv)(?:\.gz)?)$", re.IGNORECASE)
COPY = re.compile(r" ?\(\d+\)$")  # added by browsers to the name of a second download
HOST = re.compile(r"(?:[a-z0-9-]+\.)+[a-z]{2,24}")
PRIVATE = (".example", ".test", ".local", ".internal")  # endings of hosts that cannot be registered
USERS = ("Users.xml", "Users.xml.gz", "Users.csv", "Users.csv.gz", "Users.7z")


def find_dumps(path: Path) -> list[Path]:
    """Return the files with posts: the path itself, or all of a folder. Raises InputError."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.rglob("*") if _is_dump(file))
    if not found:
        raise InputError(
            f"source.path: {path} holds no file whose name ends in {DUMP_ENDINGS}: "
            "give a dump, or a folder of them."
        )
    return found


def _is_dump(file: Path) -> bool:
    ends = file.name.lower().endswith(tuple(ending.lower() for ending in DUMPS))
    hidden = file.name.startswith(".")  # macOS puts ._Posts.xml beside what it copies
    return ends and not hidden and not OTHER_TABLES.search(file.name) and file.is_file()


def find_sites(path: Path, site: str) -> dict[Path, str]:
    """Return the site of each dump: ``site`` if it is set, else what the name of the file or folder says.

    Raises InputError.
    """
    files = find_dumps(path)
    named = {file: host_in_name(file) for file in files}
    hosts = sorted({host for host in named.values() if host})
    if site and len(hosts) > 1:
        some = ", ".join([*hosts[:3], "..."][: len(hosts)])
        raise InputError(
            f"source.site names one site, {site}, but {path} holds dumps of {len(hosts)} ({some}): "
            "leave source.site empty, or give one site's dump."
        )
    if site:
        return dict.fromkeys(files, site)
    unnamed = [file for file in files if not named[file]]
    if unnamed and (hosts or len({file.parent for file in unnamed}) > 1):
        raise InputError(
            f"source.path: {path} holds several dumps, and of {unnamed[0]} no name says the site: call it or "
            "its "
            "folder as it is published (travel.stackexchange.com.7z, travel.stackexchange.com/Posts.xml), or "
            "set source.site if all are of one site."
        )
    return {file: host or UNKNOWN_SITE for file, host in named.items()}


def host_in_name(file: Path) -> str:
    """Return the site in the name of a dump's file or folder; "" if neither names one.

    Dumps are called <site>.7z, <site>-Posts.7z or <site>/Posts.xml.
    """
    place = Path(os.path.abspath(file))
    for name in (ENDING.sub("", place.name), place.parent.name):
        host = COPY.sub("", name.lower())
        if HOST.fullmatch(host) and _can_exist(host):
            return host
    return ""


def users_beside(file: Path) -> Path | None:
    """Return the file beside a dump that holds its users, such as Users.xml; None if there is none.

    A file whose name has no site belongs to the dump if the folder holds no other.
    """
    names = [TABLE.sub(name, file.name) for name in USERS] if TABLE.search(file.name) else []
    if not any(other != file and _is_dump(other) for other in file.parent.iterdir()):
        names += USERS
    return next(
        (place for name in names if (place := file.with_name(name)) != file and place.is_file()), None
    )


def _can_exist(host: str) -> bool:
    """Return whether a host of this name can exist: my.backup cannot."""
    if host.endswith(PRIVATE):
        return True
    # slow to import, and most dumps have no such name
    from publicsuffixlist import PublicSuffixList

    return PublicSuffixList(accept_unknown=False, only_icann=True).privatesuffix(host) is not None
