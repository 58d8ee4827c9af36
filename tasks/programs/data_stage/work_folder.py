"""The folder of what the data stage has half done: what a killed program goes on from, and nothing that was done for something else."""

import json
import shutil
from pathlib import Path

from tasks.config.jobs import DataJob
from tasks.programs.runtime.program import Run

DESCRIPTION = "about.json"  # what the work is about


def open_folder(job: DataJob, run: Run) -> Path:
    """The folder; what was done there for another job or other inputs is cleared."""
    work = run.checkpoints / "work"
    inputs = {name: [str(path), *_size_and_time(path)] for name, path in sorted(run.inputs.items())}
    about = json.dumps([job.model_dump(mode="json"), inputs, _boot_id()])
    if not (work / DESCRIPTION).exists() or (work / DESCRIPTION).read_text() != about:
        clear(work)
        work.mkdir(exist_ok=True)
        (work / DESCRIPTION).write_text(about)
    return work


def clear(work: Path) -> None:
    """Some of it may stay while a shard elsewhere is still writing; without ABOUT it counts for nothing."""
    (work / DESCRIPTION).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes of a file or folder, and when the newest of its files was last written."""
    found = [file.stat() for file in ([path, *path.rglob("*")] if path.is_dir() else [path]) if file.exists()]
    return sum(one.st_size for one in found), max(one.st_mtime_ns for one in found)


def _boot_id() -> str:
    """Which start of the machine this is: what was written before the last one may not have reached the disk."""
    place = Path("/proc/sys/kernel/random/boot_id")
    return place.read_text() if place.exists() else ""
