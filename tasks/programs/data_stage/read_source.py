"""Read a source in the format that its settings name: blocks of rows into records, partitions into questions.

Any worker can do this for any block or partition: the result depends on the task alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from tasks.config import dump_files
from tasks.config.sections.sources import (
    HhRlhf,
    OwnRows,
    ShellSite,
    Source,
    StackExchangeDump,
    StackExchangePaired,
    StackExchangePreferences,
)
from tasks.dataset import sorted_files
from tasks.dataset.columns import Questions, from_rows
from tasks.dataset.readers import blocks, csv_columns, dump_tables, row_files
from tasks.dataset.readers.blocks import Block
from tasks.dataset.readers.quarantine import Place, RejectRow
from tasks.dataset.readers.row_files import Row
from tasks.dataset.readers.user_names import UserNames, read_user_names
from tasks.dataset.sources import (
    hh_rlhf,
    own_rows,
    stack_exchange,
    stack_exchange_dump,
    stack_exchange_sets,
)
from tasks.dataset.sources.column_meanings import Columns
from tasks.dataset.sources.grouping import AnswerGroups, AnswerRecord
from tasks.dataset.sources.markdown import to_markdown
from tasks.dataset.sources.row_warnings import RowWarnings
from tasks.dataset.sources.stack_exchange_dump import Post, Unreadable
from tasks.dataset.splits import is_test
from tasks.system.files import replacing

Record = tuple[int, Any]  # number of a question, and what JSON can hold
BUILT_IN_SITE = "shell.example"
MOST_COLUMNS = 1000  # whose names are counted of a block
# Columns of the rows of a published set. Files beside them (hh-rlhf's red-team-attempts) have other columns.
COLUMNS = {
    "stack-exchange-preferences": frozenset(("question", "answers")),
    "stack-exchange-paired": frozenset(("question", "response_j", "response_k")),
    "hh-rlhf": frozenset(("chosen", "rejected")),
}


class BlockTask(NamedTuple):
    """A block to be read, and the file that its records are written to."""

    block: Block
    source: Source
    site: str  # of a dump
    several_sites: bool  # whether the source is a folder of several sites' dumps
    output: Path
    names: Path | None = None  # folder of the names of a dump's users


class BlockCounts(NamedTuple):
    """Counts of one block."""

    file: str
    bytes: int  # of the source, read so far
    rows: int
    read: Counter[str]
    dropped: Counter[str]
    bad: list[tuple[int, str]]  # number of the row in the block, from 1, and the reason
    warnings: RowWarnings


def iter_blocks(source: Source, path: Path) -> Iterator[tuple[Block, str]]:
    """Yield the blocks of the source, each with its site if the source is a dump. Raises InputError."""
    if not isinstance(source, ShellSite | StackExchangeDump):
        yield from ((block, "") for block in row_files.iter_blocks(path, _columns_of(source)))
        return
    bytes_before = 0
    for file, site in sites_of(source, path).items():
        name = blocks.display_name(file, path)
        for block in dump_tables.iter_blocks(file):
            yield block._replace(file=name, bytes_read=bytes_before + block.bytes_read), site
        bytes_before += file.stat().st_size


def _columns_of(source: Source) -> frozenset[str]:
    return COLUMNS.get(source.kind, frozenset())


def source_size(source: Source, path: Path) -> int:
    """Return the bytes of the source's files."""
    if isinstance(source, ShellSite | StackExchangeDump):
        return sum(dump_tables.file_size(file) for file in dump_files.find_dumps(path))
    files, _ = row_files.split_by_columns(path, _columns_of(source))
    return sum(file.stat().st_size for file in files)


def other_files(source: Source, path: Path) -> list[str]:
    """Return the files beside a published set's rows that are not read, by the names that the card shows."""
    if isinstance(source, ShellSite | StackExchangeDump):
        return []
    _, others = row_files.split_by_columns(path, _columns_of(source))
    return [blocks.display_name(file, path) for file in others]


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
    """Return the blocks of a dump's users, in the same archive or beside it; None if there are none."""
    for candidate in (file, dump_files.users_beside(file)):
        if candidate and _has_users(candidate, is_dump=candidate == file):
            return dump_tables.iter_blocks(candidate, csv_columns.USERS)
    return None


def _has_users(candidate: Path, *, is_dump: bool) -> bool:
    """Return whether a file has users: an archive may, a plain file if it is not the posts themselves."""
    if candidate.suffix != ".7z":
        return not is_dump
    from tasks.dataset.readers import seven_zip  # most sources come without, and it is slow to import

    return seven_zip.has_member(candidate, "Users.xml")


# ------------------------------------------------------------------------------------- blocks to records


def read_block(task: BlockTask) -> BlockCounts:
    """Read a block and write its records, sorted by the numbers of their questions. Raises InputError."""
    block = task.block
    counts = BlockCounts(block.file, block.bytes_read, 0, Counter(), Counter(), [], RowWarnings.empty())
    if isinstance(task.source, ShellSite | StackExchangeDump):
        num_rows, records = _read_posts(task, counts)
    elif isinstance(task.source, StackExchangePreferences):
        num_rows, records = _read_preferences(task, counts)
    else:
        num_rows, records = _read_rows(task, counts)
    sorted_files.write(records, task.output)
    warnings = counts.warnings.most_common(MOST_COLUMNS)
    return counts._replace(rows=num_rows, bad=sorted(counts.bad), warnings=warnings)


def _read_posts(task: BlockTask, counts: BlockCounts) -> tuple[int, pa.RecordBatch]:
    posts: list[Post] = []
    number = 0
    with UserNames(task.names) if task.names else nullcontext() as names:
        for number, post in enumerate(stack_exchange_dump.read_posts(task.block), 1):
            if isinstance(post, Post):
                if names and post.author_id:
                    post = post._replace(author_name=names.get(post.author_id))
                posts.append(post)
            elif isinstance(post, Unreadable):
                counts.bad.append((number, post.reason))
            else:
                counts.dropped[post] += 1
    counts.read.update("answers" if post.parent else "questions" for post in posts)
    return number, stack_exchange.to_columns(posts, task.site, several_sites=task.several_sites)


def _read_rows(task: BlockTask, counts: BlockCounts) -> tuple[int, pa.RecordBatch]:
    rows, number = _take_rows(row_files.read_block(task.block), task.block.file, counts)
    return number, to_batch(_records_from_rows(task.source, rows, counts))


def _take_rows(
    values: Iterable[dict[str, Any] | str], file: str, counts: BlockCounts, before: int = 0
) -> tuple[list[Row], int]:
    """Return the rows that can be read, with their numbers after ``before``, and the last row's number."""
    rows, number = [], before
    for number, fields in enumerate(values, before + 1):
        if isinstance(fields, str):
            counts.bad.append((number, fields))
        else:
            rows.append(Row(Place(file, number), fields))
    counts.read["rows"] += len(rows)
    return rows, number


def _read_preferences(task: BlockTask, counts: BlockCounts) -> tuple[int, pa.RecordBatch]:
    number, file = 0, task.block.file
    batches = [stack_exchange_sets.read_preferences([], _rejecting(counts))]  # a block may have no rows
    for piece in row_files.read_pieces(task.block):
        table = stack_exchange_sets.as_preferences(piece) if isinstance(piece, pa.RecordBatch) else None
        if table is None:
            rows, number = _take_rows(row_files.iter_rows(piece), file, counts, number)
            table = stack_exchange_sets.read_preferences(rows, _rejecting(counts))
        else:
            number += len(table)
            counts.read["rows"] += len(table)
        batches.append(table)
    table = pa.concat_batches(batches)
    return number, stack_exchange_sets.to_questions(table, split="evaluation" if is_test(file) else "")


def _rejecting(counts: BlockCounts) -> RejectRow:
    return lambda place, reason: counts.bad.append((place.row, reason))


def to_batch(records: list[Record]) -> pa.RecordBatch:
    """Return records of rows as a batch that ``sorted_files`` can write: keys, and the rest as JSON."""
    keys = pa.array([key for key, _ in records], pa.int64())
    texts = pa.array([orjson.dumps(record, default=list) for _, record in records], pa.large_binary())
    return pa.RecordBatch.from_pydict({"key": keys, "record": texts})


def _records_from_rows(source: Source, rows: list[Row], counts: BlockCounts) -> list[Record]:
    reject = _rejecting(counts)
    match source:
        case StackExchangePaired():
            groups = stack_exchange_sets.group_pairs(rows, reject)
        case HhRlhf():
            one_turn = source.turns == "single"
            groups = hh_rlhf.group_rows(rows, counts.dropped, reject, one_turn=one_turn)
        case OwnRows():
            columns = Columns(**source.model_dump(include=set(Columns._fields)))
            groups = own_rows.group_rows(
                rows,
                reject,
                columns,
                site=source.site,
                licence=source.licence,
                warnings=counts.warnings,
            )
            counts.dropped.update(counts.warnings.left_out)
        case _:
            raise AssertionError(source)
    return groups.records


class NamesTask(NamedTuple):
    """A block of a dump's users, and the file that their names are written to."""

    block: Block
    output: Path


def read_names(task: NamesTask) -> None:
    """Write (number, name) of every user of a block as JSON. Raises InputError."""
    with replacing(task.output) as new:
        new.write_bytes(orjson.dumps(read_user_names(task.block)))


# ---------------------------------------------------------------------------------- records to questions


def build_questions(source: Source, records: pa.RecordBatch, dropped: Counter[str]) -> Questions:
    """Return the questions of a partition's records. The order of the records does not matter.

    Their answers still need what ``text_converter`` returns.
    """
    if isinstance(source, ShellSite | StackExchangeDump):
        return stack_exchange.build_questions(records, dropped)
    if isinstance(source, StackExchangePreferences):
        return stack_exchange_sets.build_questions(records, dropped)
    keys, texts = (column.to_pylist() for column in records.columns)
    values = map(orjson.loads, texts)
    match source:
        case StackExchangePaired():
            site, licence = stack_exchange_sets.SITE, stack_exchange_sets.LICENCE
        case HhRlhf():
            site, licence = hh_rlhf.SITE, hh_rlhf.LICENCE
        case OwnRows():
            site, licence = source.site, source.licence
    answers = zip(keys, map(AnswerRecord._make, values), strict=True)
    return from_rows(list(AnswerGroups(site, licence, answers).questions(dropped)))


def text_converter(source: Source) -> Callable[[str], str] | None:
    """Return what converts the texts of the answers that ``build_questions`` returns, if anything has to."""
    is_html = isinstance(source, ShellSite | StackExchangeDump | StackExchangePreferences)
    return to_markdown if is_html else None
