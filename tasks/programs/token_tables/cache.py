"""Tokenise a table once and keep its token ids in memory-mapped files, which every rank of every start reads.

HOME/tokens/<key>/part-00000-of-00002.arrow ...   Arrow IPC streams, in the order of the table
HOME/tokens/<key>/table.json                      sha256 of each part, what was truncated; written last

The key is the hash of everything that the ids depend on: the table's content, the tokenizer, the limits, the
code that encodes, and the libraries' versions. Each rank writes one part, so tokenising takes as long as one
share of the table. Without ALIGNFLOW_HOME (a program started by hand) the files lie in the program's folder.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tasks.programs.runtime.program import ReportProgress, Run
from tasks.programs.runtime.table_rows import chats_of
from tasks.programs.token_tables.token_table import TokenTable
from tasks.rlhf.batches.truncation import Encoder, TruncationCounts
from tasks.rlhf.compute import distributed
from tasks.system.errors import InputError
from tasks.system.files import replace_text, replacing
from tasks.system.hashing import digest_of, file_digest, folder_digest
from tasks.system.locks import try_acquire
from tasks.system.module_sources import find_module, source_digest

T = TypeVar("T")
Rows = list[dict[str, Any]]

FORMAT = 1  # of the files
RECORD = "table.json"
BATCH_ROWS = 1024  # of the table at a time, as text
LIBRARIES = ("tokenizers", "transformers")
POLL_SECONDS = 1.0  # between two attempts to get the lock of a table


class Source(NamedTuple):
    """Rows of a table, and how they become token ids."""

    table: Path  # parquet
    columns: list[str]
    group_by: str | None  # rows with equal values follow each other and are encoded together
    encode: Callable[[Encoder, Rows], pa.RecordBatch]
    module: str  # that defines ``encode``
    encoders: str  # the module by which it encodes texts; everything that this imports counts too
    settings: dict[str, Any]  # what else the ids depend on


class Record(TypedDict):
    """table.json: what is in a table of token ids."""

    facts: dict[str, Any]  # what the key is the hash of
    parts: dict[str, str]  # sha256 by file name, in order
    cut: dict[str, int]  # TruncationCounts of the table


def load_tokens(
    run: Run, source: Source, encoder: Encoder, decode: Callable[[pa.RecordBatch], list[T]], *, phase: str
) -> TokenTable[T]:
    """Return the token ids of a table, tokenised first if no intact files hold them.

    All ranks call this together. ``encoder`` counts what is truncated, whether or not it was tokenised now;
    ``decode`` reads a batch of what ``source.encode`` wrote. ``phase`` names the work in progress reports.
    """
    home = Path(os.environ.get("ALIGNFLOW_HOME") or run.directory)
    facts = distributed.from_first(lambda: _facts(home, source, encoder))
    key = digest_of(facts)
    folder = Path(distributed.from_first(lambda: str((home / "tokens" / key).absolute())))
    with _lock_table(home / "locks" / f"{key}.lock", run):
        record = distributed.from_first(lambda: _read_intact(folder, home))
        if record is None:
            record = _write(folder, facts, source, encoder, run.phase(phase))
    encoder.count(TruncationCounts(**record["cut"]))
    return TokenTable(_open_parts(folder, record), decode)


@contextmanager
def _lock_table(lock: Path, run: Run) -> Iterator[None]:
    """Hold the lock of a table on the first rank; wait on all ranks while another run tokenises it.

    The ranks exchange whether it is held, and none waits inside a collective, which would time out.
    """
    report_waiting = run.phase("waiting for another run that tokenises this table")
    with ExitStack() as held:

        def try_lock() -> bool:
            file = try_acquire(lock)
            if file:
                held.enter_context(file)
            return file is not None

        while not distributed.from_first(try_lock):
            report_waiting(0, 0)
            time.sleep(POLL_SECONDS)
        yield


def _facts(home: Path, source: Source, encoder: Encoder) -> dict[str, Any]:
    """Return everything that the token ids depend on."""
    return {
        "format": FORMAT,
        "table": file_digest(source.table, memory=home / "digests"),
        "columns": source.columns,
        "settings": source.settings,
        "tokenizer": tokenizer_digest(encoder.tokenizer),
        "template": encoder.template,
        "max_prompt_tokens": encoder.max_prompt_tokens,
        "max_answer_tokens": encoder.max_answer_tokens,
        "code": [source_digest(source.encoders), *map(_file_digest, (source.module, __name__))],
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def _file_digest(module: str) -> str:
    path = find_module(module)
    assert path is not None
    return file_digest(path)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of the files that a tokenizer saves, with its chat template and added tokens.

    Two folders of one tokenizer have equal digests: the base's and that of the model merged from it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        return folder_digest(folder)


def _read_intact(folder: Path, home: Path) -> Record | None:
    """Return the record of a table whose files are all there and unaltered, else None."""
    try:
        record: Record = json.loads((folder / RECORD).read_text())
        for name, sha256 in record["parts"].items():
            if file_digest(folder / name, memory=home / "digests") != sha256:
                return None
        TruncationCounts(**record["cut"])
        os.utime(folder / RECORD)  # `alignflow gc` keeps what was used lately
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _write(
    folder: Path, facts: dict[str, Any], source: Source, encoder: Encoder, report_progress: ReportProgress
) -> Record:
    """Tokenise the table, each rank a part of it; return the record, which the first rank writes last."""
    rank, world = distributed.rank(), distributed.world()
    folder.mkdir(parents=True, exist_ok=True)
    name = f"part-{rank:05d}-of-{world:05d}.arrow"
    own = encoder.fresh()
    with replacing(folder / name, sync=True) as temporary:
        distributed.run_together(_write_part(temporary, source, own, report_progress))
    found = distributed.all_gather((name, file_digest(folder / name), own.cut))
    counts = map(sum, zip(*(cut for _, _, cut in found), strict=True))
    record = Record(
        facts=facts,
        parts={name: sha256 for name, sha256, _ in found},
        cut=TruncationCounts(*counts)._asdict(),
    )
    if distributed.is_first():
        replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    distributed.barrier()
    return record


def _write_part(
    path: Path, source: Source, encoder: Encoder, report_progress: ReportProgress
) -> Iterator[None]:
    """Write this rank's part of the table; yield after each batch."""
    starts = _group_starts(source)
    rank, world = distributed.rank(), distributed.world()
    first, last = (len(starts) * number // world for number in (rank, rank + 1))
    bounds = np.append(starts, pq.read_metadata(source.table).num_rows)
    start, end = int(bounds[first]), int(bounds[last])
    num_rows, done = end - start, 0
    empty = source.encode(encoder.fresh(), [])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, empty.schema) as writer:
        for rows in _iter_groups(source, start, end):
            encoder.chats = chats_of(rows)
            writer.write_batch(source.encode(encoder, rows))
            done += len(rows)
            report_progress(done * world, num_rows * world)
            yield


def _group_starts(source: Source) -> NDArray[np.int64]:
    """Return the number of the first row of each group, or of each row if rows are not grouped."""
    if source.group_by is None:
        return np.arange(pq.read_metadata(source.table).num_rows)
    values = pq.read_table(source.table, columns=[source.group_by])[source.group_by].to_numpy()
    starts = np.append(np.zeros(min(1, len(values)), dtype=np.int64), np.flatnonzero(np.diff(values)) + 1)
    is_grouped = len(starts) == len(np.unique(values))
    assert is_grouped, f"{source.table.name}: rows of a {source.group_by} are apart"
    return starts


def _iter_groups(source: Source, first: int, last: int) -> Iterator[Rows]:
    """Yield the rows from ``first`` to before ``last``, about BATCH_ROWS at a time, and whole groups."""
    rows: Rows = []
    for batch in _iter_batches(source, first, last):
        rows += batch.to_pylist()
        end = len(rows)
        if source.group_by is not None:  # the last group may continue in the next batch
            while end and rows[end - 1][source.group_by] == rows[-1][source.group_by]:
                end -= 1
        if end:
            yield rows[:end]
        del rows[:end]
    if rows:
        yield rows


def _iter_batches(source: Source, first: int, last: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows from ``first`` to before ``last``; row groups without any are not read."""
    with pq.ParquetFile(source.table) as file:
        columns = [*source.columns, *{"messages"}.intersection(file.schema_arrow.names)]
        start = 0
        for number in range(file.num_row_groups):
            end = start + file.metadata.row_group(number).num_rows
            if start < last and end > first:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[number], columns=columns):
                    skipped, kept = max(0, first - start), min(len(batch), last - start)
                    if kept > skipped:
                        yield batch.slice(skipped, kept - skipped)
                    start += len(batch)
            start = end


def _open_parts(folder: Path, record: Record) -> list[pa.RecordBatch]:
    """Return the batches of all parts, which lie in memory-mapped files.

    Raises InputError if this machine does not see a part, or if one was deleted in the meantime.
    """
    batches: list[pa.RecordBatch] = []
    for name in record["parts"]:
        try:
            batches += pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all().to_batches()
        except FileNotFoundError as error:
            if distributed.world() > 1:
                raise InputError(
                    f"{folder / name} is not seen by every process of this run: put ALIGNFLOW_HOME on a disk "
                    "that all nodes share."
                ) from error
            raise InputError(
                f"{folder / name} was deleted while this program started: start it again, and the table is "
                "tokenised again."
            ) from error
    return batches
