"""The folder of what the data stage has half done: what a killed program goes on from, and nothing that was done for something else."""

import json
import shutil
from pathlib import Path

from tasks.config.jobs import DataJob
from tasks.programs.runtime.program import Run

ABOUT = "about.json"  # what the work is about


def opened(job: DataJob, run: Run) -> Path:
    """The folder; what was done there for another job or other inputs is cleared."""
    work = run.checkpoints / "work"
    inputs = {name: [str(path), *_touched(path)] for name, path in sorted(run.inputs.items())}
    about = json.dumps([job.model_dump(mode="json"), inputs, _boot()])
    if not (work / ABOUT).exists() or (work / ABOUT).read_text() != about:
        clear(work)
        work.mkdir(exist_ok=True)
        (work / ABOUT).write_text(about)
    return work


def clear(work: Path) -> None:
    """Some of it may stay while a shard elsewhere is still writing; without ABOUT it counts for nothing."""
    (work / ABOUT).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _touched(path: Path) -> tuple[int, int]:
    """Bytes of a file or folder, and when the newest of its files was last written."""
    found = [file.stat() for file in ([path, *path.rglob("*")] if path.is_dir() else [path]) if file.exists()]
    return sum(one.st_size for one in found), max(one.st_mtime_ns for one in found)


def _boot() -> str:
    """Which start of the machine this is: what was written before the last one may not have reached the disk."""
    place = Path("/proc/sys/kernel/random/boot_id")
    return place.read_text() if place.exists() else ""
