"""Store the names of a site's users, from a dump's Users.xml, on disk and look them up by number.

There may be more names than fit into memory.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from tasks.dataset.readers.blocks import Block
from tasks.dataset.readers.dump_tables import read_rows
from tasks.system.files import replacing

MAX_USER_NUMBER = 2**31  # no user has a higher number


def read_user_names(block: Block) -> list[tuple[int, str]]:
    """Return (number, display name) of every user of a block who has both. Raises InputError."""
    return [(int(number), name) for number, name in _iter_names(block)]


def _iter_names(block: Block) -> Iterator[tuple[str, str]]:
    for fields in read_rows(block):
        if isinstance(fields, str):  # this user's posts show the number instead of a name
            continue
        number, name = (
            fields.get("Id", "").removesuffix(".0"),
            " ".join(fields.get("DisplayName", "").split()),
        )
        if number.isascii() and number.isdecimal() and int(number) < MAX_USER_NUMBER and name:
            yield number, name


class UserNames:
    """A folder with one file of all names, and one of the start and end of each user's name."""

    def __init__(self, folder: Path) -> None:
        self.texts, self.places = folder / "names", folder / "places"

    def write(self, names: Iterable[list[tuple[int, str]]]) -> None:
        """Write the names; of a number that repeats the later name is kept."""
        self.texts.parent.mkdir(exist_ok=True)
        offset = 0
        with (
            replacing(self.texts) as new_texts,
            replacing(self.places) as new_places,
            new_texts.open("wb") as texts,
            new_places.open("wb") as places,
        ):
            for batch in names:
                for number, name in batch:
                    texts.write(text := name.encode())
                    places.seek(16 * number)
                    places.write(np.array([offset, offset + len(text)], dtype=np.int64).tobytes())
                    offset += len(text)

    def __enter__(self) -> Self:
        self.open = [os.open(path, os.O_RDONLY) for path in (self.texts, self.places)]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.open:
            os.close(file)

    def get(self, number: str) -> str:
        """Return the user's name, "" if it is not known."""
        if not number.isascii() or not number.isdecimal() or int(number) >= MAX_USER_NUMBER:
            return ""
        texts, places = self.open
        entry = os.pread(places, 16, 16 * int(number))
        start, end = np.frombuffer(entry, dtype=np.int64).tolist() if len(entry) == 16 else (0, 0)
        return os.pread(texts, end - start, start).decode()
