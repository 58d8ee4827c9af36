"""Test how the parts of the data stage are made: in order, once, by this process or by others."""

import errno
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tasks.config.jobs import DataJob
from tasks.config.sections.sources import OwnRows
from tasks.dataset.readers import blocks
from tasks.programs import data
from tasks.programs.data_stage import read_source
from tasks.programs.data_stage.code_digest import LIBRARIES, code_digest
from tasks.programs.data_stage.executors import open_parts
from tasks.programs.data_stage.parts import Parts, counts_path, make_part, read_counts
from tasks.programs.runtime.program import Run
from tasks.system.errors import DiskFailure, InputError, StageFailed
from tests.support import tiny
from tests.support.squares import Counts, Task, kill_at_three, refuse_three, write_square


def open_run(folder: Path, threads: int) -> Run:
    folder.mkdir()
    record = {"stage": "data", "job": {}, "inputs": {}, "machine": {"threads": threads}}
    (folder / "job.json").write_text(json.dumps(record))
    return Run(folder)


def tasks_in(folder: Path, count: int, drawn: list[int] | None = None) -> Iterator[Task]:
    for number in range(count):
        if drawn is not None:
            drawn.append(number)
        yield Task(number, folder / str(number))


@pytest.mark.parametrize("threads", [1, 2])
def test_parts_come_in_order_and_tasks_are_read_as_parts_are_taken(threads: int, tmp_path: Path) -> None:
    drawn: list[int] = []
    with open_parts(open_run(tmp_path / "run", threads)) as parts:
        made = parts.make(write_square, tasks_in(tmp_path, 20, drawn))
        assert next(made).name == "0"
        assert len(drawn) <= 2 * threads + 2  # what is read ahead waits on the disk
        assert [path.name for path in made] == [str(number) for number in range(1, 20)]
        pool = set(getattr(parts.executor, "_processes", None) or ())
        assert [read_counts(tmp_path / str(number), Counts).squares for number in (0, 19)] == [0, 361]
    assert len(pool) == (threads if threads > 1 else 0)
    assert not [child for child in psutil.Process().children() if child.pid in pool]


def test_one_part_starts_no_process(tmp_path: Path) -> None:
    before = len(psutil.Process().children())
    with open_parts(open_run(tmp_path / "run", 2)) as parts:
        assert len(list(parts.make(write_square, tasks_in(tmp_path, 1)))) == 1
        assert len(psutil.Process().children()) == before


def test_a_part_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    done = tmp_path / "done"
    with open_parts(open_run(tmp_path / "run", 1)) as parts:
        list(parts.make(write_square, tasks_in(tmp_path, 3)))
        (tmp_path / "1").write_text("as it was")
        counts_path(tmp_path / "2").unlink()
        (tmp_path / "2").write_text("half of it")
        list(parts.make(write_square, tasks_in(tmp_path, 3), done=done))
        assert [(tmp_path / name).read_text() for name in "012"] == ["0", "as it was", "4"]
        drawn: list[int] = []
        again = list(parts.make(write_square, tasks_in(tmp_path, 3, drawn), done=done))
    assert again == [tmp_path / name for name in "012"]
    assert not drawn


@pytest.mark.parametrize("threads", [1, 2])
def test_a_refused_input_is_refused_in_its_words(threads: int, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"^three is refused$"),
        open_parts(open_run(tmp_path / "run", threads)) as parts,
    ):
        list(parts.make(refuse_three, tasks_in(tmp_path, 9)))


def test_a_killed_process_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(StageFailed, match="processes of the data stage was killed, perhaps because memory"),
        open_parts(open_run(tmp_path / "run", 2)) as parts,
    ):
        list(parts.make(kill_at_three, tasks_in(tmp_path, 9)))
    with open_parts(open_run(tmp_path / "again", 2)) as parts:
        assert len(list(parts.make(write_square, tasks_in(tmp_path, 9)))) == 9


def test_the_digest_of_code_knows_the_versions_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: version(name) for name in LIBRARIES}
    before = code_digest.__wrapped__()
    for name in LIBRARIES:
        others = known | {name: "0.0.1"}
        monkeypatch.setattr("tasks.programs.data_stage.code_digest.version", others.__getitem__)
        assert code_digest.__wrapped__() != before


def test_a_worker_refuses_other_code_and_a_disk_that_it_does_not_share(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="other code, or other versions of libraries, than"):
        make_part(write_square, Task(1, tmp_path / "1"), "other")
    absent = tmp_path / "absent"
    with pytest.raises(StageFailed, match=f"does not see {absent}: put ALIGNFLOW_HOME on a disk that all"):
        make_part(write_square, Task(1, absent / "1"), code_digest())
    assert make_part(write_square, Task(1, tmp_path / "1"), code_digest()) == tmp_path / "1"


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl"])
def test_a_worker_refuses_a_source_that_it_does_not_see_and_has_to_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{ending}"
    table = pa.Table.from_pylist([{"prompt": "a", "completion": "b"}])
    if ending == "parquet":
        pq.write_table(table, path)
    elif ending == "arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(json.dumps(table.to_pylist()[0]))
    source = OwnRows(path=str(path))
    ((block, site),) = read_source.iter_blocks(source, path)
    stored = blocks.store_content(block, tmp_path / "stored")
    path.rename(tmp_path / "elsewhere")
    task = read_source.BlockTask(stored, source, site, several_sites=False, output=tmp_path / "records")
    if ending == "jsonl":  # its text is with the parts
        make_part(read_source.read_block, task, code_digest())
        assert read_counts(task.output, read_source.BlockCounts).rows == 1
        return
    with pytest.raises(StageFailed, match=f"does not see {path}: put the source on a disk that all of them"):
        make_part(read_source.read_block, task, code_digest())
    (tmp_path / "elsewhere").rename(path)
    make_part(read_source.read_block, task, code_digest())
    assert read_counts(task.output, read_source.BlockCounts).rows == 1


def test_parts_say_who_made_them(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    with open_parts(open_run(tmp_path / "run", 1)) as parts:
        reporting = Parts(parts.executor, 1, on_part=lambda step, makers: seen.append((step, makers.total())))
        list(reporting.make(write_square, tasks_in(tmp_path, 3)))
    assert seen == [("write_square", 1), ("write_square", 2), ("write_square", 3)]


def test_a_full_disk_keeps_the_parts_that_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Why {n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(60)]
    source.write_text("\n".join(map(json.dumps, rows)))
    record = {"source": {"kind": "own", "path": "rows.jsonl"}, "data": {}, "seed": 0}
    run = Run(tiny.write_job(tmp_path / "run", "data", record, {"source": source}, threads=1))
    job = DataJob.model_validate(run.record)

    def fill_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("tasks.programs.data_stage.partitions.question_files.write", fill_disk)
        with pytest.raises(DiskFailure):
            data.prepare(job, run)
    made = sorted((run.checkpoints / "work").glob("records*"))
    assert made
    with monkeypatch.context() as again:
        again.setattr("tasks.programs.data_stage.read_source.read_block", fill_disk)
        data.prepare(job, run)
    assert (run.artifact / "card.json").exists()
