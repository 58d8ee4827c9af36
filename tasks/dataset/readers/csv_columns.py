"""Find the columns of a dump's CSV export and read the values of its rows."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tasks.system.errors import InputError

POSTS, USERS = "posts", "users"  # tables of a dump
READ = {
    POSTS: (
        *("Id", "PostTypeId", "AcceptedAnswerId", "ParentId", "CreationDate", "Score", "Body"),
        *("OwnerUserId", "OwnerDisplayName", "Title", "ContentLicense"),
    ),
    USERS: ("Id", "DisplayName"),
}
NEEDED = {POSTS: ("Id", "PostTypeId", "ParentId", "Score", "Body"), USERS: READ[USERS]}
# how Data Explorer, MySQL, R, pandas and spreadsheets write a missing value, in lower case
MISSING_VALUES = {"null", "na", "n/a", "#n/a", "<na>", "\\n", "nan", "-nan", "nat", "none", "nil", "(null)"}
LONGEST_MISSING = 8  # characters, with blanks around it
UNDECODED = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8

OTHER_WIDTH = "rows with more or fewer fields than the header"
NOT_UTF_8 = "rows with bytes that are not UTF-8"


def find_columns(header: list[str], table: str, path: Path) -> dict[str, int]:
    """Return the index of each column that is read. Raises InputError.

    Case, underscores, and spaces and byte-order marks around a name are ignored. If a name comes twice, the
    table was joined with another. Then the first column is read if the other table's columns follow as a
    whole, from its Id on (`select * from Posts join Users`); in any other order it is unclear which one is
    meant.
    """
    known = {name.lower(): name for name in READ[table]}
    names = [known.get(_normalise(name), "") for name in header]
    repeats = (index for index, name in enumerate(names) if name and name in names[:index])
    again = next(repeats, len(names))
    _check_columns(header, names[:again], table, path)
    if again < len(names) and names[again] != "Id":
        _refuse_twice(header, names, again, path)
    return {name: index for index, name in enumerate(names[:again]) if name}


def _normalise(name: str) -> str:
    """Return a column's name as it is compared: BigQuery's dumps call PostTypeId post_type_id."""
    return name.strip("\ufeff \t").lower().replace("_", "")


def find_delimiter(head: bytes) -> str:
    """Return the delimiter of a CSV that begins with ``head``: spreadsheets also write semicolons or tabs."""
    line = head.partition(b"\n")[0]
    return max(",;\t", key=lambda mark: line.count(mark.encode()))


def _check_columns(header: list[str], names: list[str], table: str, path: Path) -> None:
    missing = [name for name in NEEDED[table] if name not in names]
    if not missing:
        return
    if len(names) < len(header):  # the missing ones may follow a name that comes twice
        again = len(names)
        everywhere = [_normalise(name) for name in header]
        if all(name.lower() in everywhere for name in missing):
            _refuse_twice(header, everywhere, again, path)
    if any(UNDECODED.search(name) for name in header):
        raise InputError(
            f"{path} is neither XML nor a CSV in UTF-8: give the Posts.xml or Posts.csv of a dump."
        )
    if missing == ["Body"]:
        raise InputError(
            f"{path} has no Body column: without the posts' text there is nothing to train on; give a dump "
            "with bodies."
        )
    kind = table.capitalize()
    raise InputError(
        f"{path} is neither a {kind}.xml nor a {kind}.csv (no column {', '.join(missing)}): give one of a "
        "Stack Exchange dump."
    )


def _refuse_twice(header: list[str], names: list[str], again: int, path: Path) -> None:
    first = names.index(names[again])
    spelled = dict.fromkeys(header[index].strip("\ufeff \t") for index in (first, again))
    raise InputError(
        f"{path} has the column {' and '.join(spelled)} twice (columns {first + 1} and {again + 1}): "
        "select each of the posts' columns once, and those of a joined table after them or not at all."
    )


def read_fields(row: list[str], width: int, columns: Iterable[tuple[str, int]]) -> Mapping[str, str] | str:
    """Return a row's values by column, "" for a missing value; or the reason why the row cannot be read."""
    if len(row) != width:
        return OTHER_WIDTH
    if not all(map(str.isascii, row)) and any(map(UNDECODED.search, row)):
        return NOT_UTF_8
    return {name: _read_value(row[index]) for name, index in columns}


def _read_value(value: str) -> str:
    is_missing = len(value) <= LONGEST_MISSING and value.strip().lower() in MISSING_VALUES
    return "" if is_missing else value
