"""Names of a site's users, as Users.xml of a dump has them: on disk, and looked up by number, for there may be more than fit into memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from tasks.dataset.readers.blocks import Block
from tasks.dataset.sources.stack_exchange_dump import read_fields_of
from tasks.system.files import replacing

MAX_USER_NUMBER = 2**31  # a number above is nobody's


def read_user_names(block: Block) -> list[tuple[int, str]]:
    """(number, display name) of every user of a block who has both. Raises InputError."""
    return [(int(number), name) for number, name in _iter_names(block)]


def _iter_names(block: Block) -> Iterator[tuple[str, str]]:
    for fields in read_fields_of(block):
        if isinstance(fields, str):  # a row that cannot be read: this user's posts name a number
            continue
        number, name = (
            fields.get("Id", "").removesuffix(".0"),
            " ".join(fields.get("DisplayName", "").split()),
        )
        if number.isascii() and number.isdecimal() and int(number) < MAX_USER_NUMBER and name:
            yield number, name


class UserNames:
    """A folder with the names one after the other, and where those of each number begin and end."""

    def __init__(self, folder: Path) -> None:
        self.texts, self.places = folder / "names", folder / "places"

    def write(self, names: Iterable[list[tuple[int, str]]]) -> None:
        """Of a number that comes twice the later name counts."""
        self.texts.parent.mkdir(exist_ok=True)
        at = 0
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
                    places.write(np.array([at, at + len(text)], dtype=np.int64).tobytes())
                    at += len(text)

    def __enter__(self) -> Self:
        self.open = [os.open(path, os.O_RDONLY) for path in (self.texts, self.places)]
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.open:
            os.close(file)

    def get(self, number: str) -> str:
        """The user's name, "" if it is not known."""
        if not number.isascii() or not number.isdecimal() or int(number) >= MAX_USER_NUMBER:
            return ""
        texts, places = self.open
        found = os.pread(places, 16, 16 * int(number))
        start, end = np.frombuffer(found, dtype=np.int64).tolist() if len(found) == 16 else (0, 0)
        return os.pread(texts, end - start, start).decode()
