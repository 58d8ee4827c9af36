"""A source in records: what one process makes of a block of rows, and another of the records of a range of questions.

Every function here is called in whichever process is free; what it gives depends on its task alone.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from tasks.config import dump_files
from tasks.config.sources import (
    HhRlhf,
    OwnRows,
    ShellSite,
    Source,
    StackExchangeDump,
    StackExchangePaired,
    StackExchangePreferences,
)
from tasks.dataset import sorted_files
from tasks.dataset.curation.question_files import question_from_json, question_to_json
from tasks.dataset.question import Question
from tasks.dataset.readers import blocks, csv_columns, row_files
from tasks.dataset.readers.blocks import Block
from tasks.dataset.readers.quarantine import Place
from tasks.dataset.readers.row_files import Row
from tasks.dataset.sorted_files import Record
from tasks.dataset.sources import (
    hh_rlhf,
    own_rows,
    stack_exchange,
    stack_exchange_dump,
    stack_exchange_sets,
)
from tasks.dataset.sources.column_meanings import Columns
from tasks.dataset.sources.grouping import AnswerGroups, AnswerRecord
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.dataset.sources.stack_exchange import NumberedPost, number_post
from tasks.dataset.sources.stack_exchange_dump import Post, Unreadable
from tasks.dataset.sources.user_names import UserNames

BUILT_IN_SITE = "shell.example"
MOST_COLUMNS = 1000  # whose names are counted of a block
COLUMNS = {  # that the rows of a published set have; what lies beside them (hh-rlhf's red-team-attempts) has others
    "stack-exchange-preferences": frozenset(("question", "answers")),
    "stack-exchange-paired": frozenset(("question", "response_j", "response_k")),
    "hh-rlhf": frozenset(("chosen", "rejected")),
}


class BlockTask(NamedTuple):
    block: Block
    source: Source
    site: str  # of a dump
    several: bool  # whether a dump has several sites
    segment: Path
    names: Path | None = None  # folder of the names of a dump's users


class BlockResult(NamedTuple):
    """What became of a block."""

    file: str
    bytes: int  # of the source, read so far
    rows: int
    read: Counter[str]
    dropped: Counter[str]
    bad: list[tuple[int, str]]  # row of the block, from 1, and the reason
    segment: Path
    seen: RowWarnings  # what was odd about a user's own rows


def iter_blocks(source: Source, path: Path) -> Iterator[tuple[Block, str]]:
    """Blocks of the source, with the site of each where it is a dump. Raises InputError."""
    if isinstance(source, ShellSite | StackExchangeDump):
        before = 0
        for file, site in sites_of(source, path).items():
            shown = blocks.display_name(file, path)
            for block in stack_exchange_dump.iter_blocks(file):
                yield block._replace(file=shown, read=before + block.read), site
            before += file.stat().st_size
    else:
        yield from (
            (block, "") for block in row_files.iter_blocks(path, COLUMNS.get(source.kind, frozenset()))
        )


def source_size(source: Source, path: Path) -> int:
    """Bytes of the source's files."""
    if isinstance(source, ShellSite | StackExchangeDump):
        return sum(stack_exchange_dump.file_size(file) for file in dump_files.find_dumps(path))
    return sum(
        file.stat().st_size
        for file in row_files.split_by_columns(path, COLUMNS.get(source.kind, frozenset()))[0]
    )


def other_files(source: Source, path: Path) -> list[str]:
    """Return the files of a published set that are not what the source reads, as its places call files."""
    if isinstance(source, ShellSite | StackExchangeDump):
        return []
    return [
        blocks.display_name(file, path)
        for file in row_files.split_by_columns(path, COLUMNS.get(source.kind, frozenset()))[1]
    ]


def sites_of(source: Source, path: Path) -> dict[Path, str]:
    """Return the site of each dump of the source; none if it holds no dumps. Raises InputError."""
    match source:
        case ShellSite():
            return {path: BUILT_IN_SITE}
        case StackExchangeDump():
            return dump_files.find_sites(path, source.site)
        case _:
            return {}


def iter_user_blocks(file: Path) -> Iterator[Block] | None:
    """The users of a dump in blocks: in the same archive, or beside it; None where there are none."""
    for place in (file, dump_files.users_beside(file)):
        if (
            place
            and (place != file or place.suffix == ".7z")
            and (place.suffix != ".7z" or _holds_users(place))
        ):
            return stack_exchange_dump.iter_blocks(place, csv_columns.USERS)
    return None


def _holds_users(place: Path) -> bool:
    from tasks.dataset.readers import seven_zip  # most sources come without, and it is slow to import

    return seven_zip.has_member(place, "Users.xml")


def read_block(task: BlockTask) -> BlockResult:
    """Read a block, and write what it says as a segment in the order of the questions' numbers. Raises InputError."""
    bad: list[tuple[int, str]] = []
    read: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    seen = RowWarnings.empty()
    if isinstance(task.source, ShellSite | StackExchangeDump):
        count, records = _read_posts(task, read, dropped, bad)
    else:
        found = list(row_files.read_block(task.block))
        good = [
            Row(Place(task.block.file, number), fields)
            for number, fields in enumerate(found, 1)
            if isinstance(fields, dict)
        ]
        bad += [(number, reason) for number, reason in enumerate(found, 1) if isinstance(reason, str)]
        count, records = len(found), _read_rows(task.source, good, dropped, bad, seen)
        read["rows"] += len(good)
    sorted_files.write(records, task.segment)
    return BlockResult(
        task.block.file,
        task.block.read,
        count,
        read,
        dropped,
        sorted(bad),
        task.segment,
        seen.most_common(MOST_COLUMNS),
    )


def _read_posts(
    task: BlockTask, read: Counter[str], dropped: Counter[str], bad: list[tuple[int, str]]
) -> tuple[int, list[Record]]:
    records: list[Record] = []
    number = 0
    with UserNames(task.names) if task.names else nullcontext() as names:
        for number, post in enumerate(stack_exchange_dump.read_posts_of(task.block), 1):
            if isinstance(post, Post):
                read["answers" if post.parent else "questions"] += 1
                if names and post.author_id:
                    post = post._replace(author_name=names.get(post.author_id))
                where = number_post(post, task.site, several=task.several)
                records.append((where.question, [where.site, list(where.post)]))
            elif isinstance(post, Unreadable):
                bad.append((number, post.reason))
            else:
                dropped[post] += 1
    return number, records


def _read_rows(
    source: Source, found: list[Row], dropped: Counter[str], bad: list[tuple[int, str]], seen: RowWarnings
) -> list[Record]:
    def tell(place: Place, reason: str) -> None:
        bad.append((place.row, reason))

    match source:
        case StackExchangePreferences():
            return [
                (question.id, question_to_json(question))
                for question in stack_exchange_sets.read_preferences(found, tell)
            ]
        case StackExchangePaired():
            gathered = stack_exchange_sets.group_pairs(found, tell)
        case HhRlhf():
            gathered = hh_rlhf.group_rows(found, dropped, tell, one_turn=source.turns == "single")
        case OwnRows():
            columns = Columns(**source.model_dump(include=set(Columns._fields)))
            gathered = own_rows.group_rows(
                found, tell, columns, site=source.site, licence=source.licence, seen=seen
            )
            dropped.update(seen.left_out)
        case _:
            raise AssertionError(source)
    return [(number, list(note)) for number, note in gathered.notes]


def build_questions(source: Source, records: Iterable[Record], dropped: Counter[str]) -> Iterator[Question]:
    """The questions that the records of a range of numbers make, by number; nothing depends on the records' order."""
    match source:
        case ShellSite() | StackExchangeDump():
            return stack_exchange.build_questions(
                (NumberedPost(number, site, Post._make(post)) for number, (site, post) in records), dropped
            )
        case StackExchangePreferences():
            return _drop_repeated((question_from_json(fields) for _, fields in records), dropped)
        case StackExchangePaired():
            about = (stack_exchange_sets.SITE, stack_exchange_sets.LICENCE)
        case HhRlhf():
            about = (hh_rlhf.SITE, hh_rlhf.LICENCE)
        case OwnRows():
            about = (source.site, source.licence)
    return AnswerGroups(*about, ((number, AnswerRecord._make(note)) for number, note in records)).questions(
        dropped
    )


def _drop_repeated(found: Iterable[Question], dropped: Counter[str]) -> Iterator[Question]:
    """Of two with the same id the smaller, so that order does not matter."""
    known: dict[int, Question] = {}
    for question in found:
        if question.id in known:
            dropped["repeated questions"] += 1
            same = known[question.id]
            question = min(question, same)._replace(
                split=max(question.split, same.split)
            )  # a test set's question stays one
        known[question.id] = question
    return iter([known[number] for number in sorted(known)])
