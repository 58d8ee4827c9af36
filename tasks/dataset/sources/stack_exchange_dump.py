"""Read the posts of a Stack Exchange dump.

AcceptedAnswerId, Title, OwnerUserId and ContentLicense may be missing; CSV exports write ids as floats
("62.0"), NULL or NA for a missing value, and bodies over several lines. A row that cannot be read is reported
with the reason, and the others are read.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tasks.dataset.readers import dump_tables
from tasks.dataset.readers.blocks import Block

QUESTION_TYPE, ANSWER_TYPE = "1", "2"
OTHER_TYPES = "post types other than question and answer"


class Unreadable(NamedTuple):
    """A row that cannot be read."""

    reason: str  # describes several such rows


class Post(NamedTuple):
    """A question or an answer; a missing value is 0 or ""."""

    id: int
    parent: int  # the question that an answer belongs to; 0 in a question
    accepted: int  # a question's accepted answer
    votes: int
    created: str  # ISO 8601, UTC
    title: str
    body: str  # HTML
    author_id: str
    author_name: str
    licence: str


def read_posts(block: Block) -> Iterator[Post | Unreadable | str]:
    """Yield every row of a block as a post.

    Instead of a row that is no question or answer, its kind; instead of one that cannot be read, the reason.
    Raises InputError.
    """
    yield from map(_parse_post, dump_tables.read_rows(block))


def _parse_post(fields: Mapping[str, str] | str) -> Post | Unreadable | str:
    if isinstance(fields, str):
        return Unreadable(fields)
    kind = fields.get("PostTypeId", "").removesuffix(".0")
    if kind not in (QUESTION_TYPE, ANSWER_TYPE):
        return OTHER_TYPES if kind.isdecimal() else Unreadable(_unreadable_reason("PostTypeId", kind))
    author = fields.get("OwnerUserId", "").removesuffix(".0")
    has_accepted = kind == QUESTION_TYPE and fields.get("AcceptedAnswerId")
    try:
        return Post(
            id=_parse_integer(fields, "Id", low=1),
            parent=_parse_integer(fields, "ParentId", low=1) if kind == ANSWER_TYPE else 0,
            accepted=_parse_integer(fields, "AcceptedAnswerId") if has_accepted else 0,
            votes=_parse_integer(fields, "Score", low=-(2**31), high=2**31),
            created=fields.get("CreationDate", ""),
            title=" ".join(fields.get("Title", "").split()),
            body=fields.get("Body", ""),
            author_id=author if author.removeprefix("-").isdecimal() else "",  # -1 is the site itself
            author_name=fields.get("OwnerDisplayName", ""),
            licence=fields.get("ContentLicense", ""),
        )
    except ValueError as error:
        return Unreadable(str(error))


def _parse_integer(fields: Mapping[str, str], column: str, *, low: int = 0, high: int = 2**63) -> int:
    text = fields.get(column, "")
    try:
        value = int(text.removesuffix(".0"))
    except ValueError:
        raise ValueError(_unreadable_reason(column, text)) from None
    if not low <= value < high:
        raise ValueError(f"rows whose {column} is out of range")
    return value


def _unreadable_reason(column: str, text: str) -> str:
    return f"rows whose {column} is no whole number" if text.strip() else f"rows without {column}"
