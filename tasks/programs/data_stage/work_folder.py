"""Open the folder of intermediate files, from which a killed data stage resumes.

Files that were made for another job, other inputs or before the machine was restarted are deleted. (The
folder of a run is named by a key of the code, too.) In the order of the steps, with counts in NAME.json:

    records000000.block     rows of the source as they are, until they are read
    names000000/            names of a dump's users: N.names of each block, then names and places
    records000000.arrow     records of a block (posts, comparisons), by question
    quarantine.jsonl        rows that cannot be used
    evaluation_ngrams.npz   n-grams of the evaluation sets
    questions000000.arrow   questions of a range of records that the rules keep
    questions000000.npz     their numbers: ids, hashes of prompts and authors, whether answers are compared
    questions000000.*       .shingles, .ends and .bands, by which near duplicates are found
    tables000000/           rows of these questions, a file per table, until they are in the table
    records.done, ...       the files of a finished step
"""

import json
import shutil
from pathlib import Path

from tasks.config.jobs import DataJob
from tasks.programs.runtime.program import Run

DESCRIPTION = "about.json"  # job and inputs that the files were made for


def open_folder(job: DataJob, run: Run) -> Path:
    """Return the folder. It is cleared if its files were made for another job or other inputs."""
    work = run.checkpoints / "work"
    inputs = {name: [str(path), *_size_and_time(path)] for name, path in sorted(run.inputs.items())}
    description = json.dumps([job.model_dump(mode="json"), inputs, _boot_id()])
    if not (work / DESCRIPTION).exists() or (work / DESCRIPTION).read_text() != description:
        clear(work)
        work.mkdir(exist_ok=True)
        (work / DESCRIPTION).write_text(description)
    return work


def clear(work: Path) -> None:
    """Delete the folder.

    A remote worker may still be writing there; without DESCRIPTION its files are ignored.
    """
    (work / DESCRIPTION).unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return the bytes of a file or folder, and the time of the last change to its files."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.exists()]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def _boot_id() -> str:
    """Return an id of the machine's last start: what was written before it may not have reached the disk."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text() if path.exists() else ""
