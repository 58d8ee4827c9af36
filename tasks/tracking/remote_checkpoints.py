"""Keep a running stage's newest checkpoint in MLflow, so that another machine can resume from it.

Uploads alternate between two slots of the stage's MLflow run; tags name the slot that is complete, its digest
and its step. A slot holds checkpoints/, metrics.jsonl and, if the stage samples answers, samples.jsonl.
"""

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tasks.system import events
from tasks.system.hashing import digest_of, file_digest
from tasks.tracking import program_log
from tasks.tracking.client import PATIENCE_TO_CONNECT
from tasks.tracking.tracked_run import LOG, TrackedRun

SLOT, DIGEST, STEP = "checkpoint.slot", "checkpoint.digest", "checkpoint.step"
LOGS, FILES = ("metrics.jsonl", "samples.jsonl"), "files.json"
MAX_ATTEMPTS = 20  # at copying a checkpoint while its program writes the next one


@contextmanager
def uploading_checkpoints(run: TrackedRun, directory: Path, seconds: float) -> Iterator[None]:
    """While the block runs, upload the newest checkpoint of ``directory`` every ``seconds``.

    Never if that is 0.
    """
    if not seconds or not run.is_on:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_upload_repeatedly, args=(run, directory, seconds, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(PATIENCE_TO_CONNECT)


def _upload_repeatedly(run: TrackedRun, directory: Path, seconds: float, ended: threading.Event) -> None:
    slot, last = int(run.known.get(SLOT, "1")), int(run.known.get(STEP, "-1"))
    while not ended.wait(seconds):
        step = newest_step(directory / "checkpoints")
        if step is None or step <= last:
            continue
        try:
            slot = 1 - slot
            upload(run, directory, slot)
            last = step
        except (
            Exception
        ) as error:  # an outage: the next checkpoint is uploaded instead, and the stage goes on
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            events.tell("warning", text=f"A checkpoint could not be uploaded: {reason}")


def newest_step(checkpoints: Path) -> int | None:
    """Return the step of the newest checkpoint; None if there is none."""
    matches = [re.fullmatch(r"step-(\d+)", path.name) for path in checkpoints.glob("step-*")]
    return max((int(match[1]) for match in matches if match), default=None)


def upload(run: TrackedRun, directory: Path, slot: int) -> None:
    """Upload the newest checkpoint of ``directory`` into a slot, then set the tags that mark it complete."""
    copy = directory / "mirror"
    step = _copy_newest(directory, copy)
    paths = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    files = {path.relative_to(copy).as_posix(): file_digest(path) for path in paths}
    (copy / FILES).write_text(json.dumps(files))
    run.tracker.upload(str(run.run_id), copy, _slot(slot))
    tags = {SLOT: str(slot), DIGEST: digest_of(files), STEP: str(step)}
    run.tracker.set_tags(str(run.run_id), tags)
    if (log := directory / LOG).is_file():  # if this machine is lost, its log is nowhere else
        program_log.write_clean(log, copy / LOG)
        run.tracker.upload(str(run.run_id), copy / LOG, None)
    shutil.rmtree(copy)


def _copy_newest(directory: Path, copy: Path) -> int:
    """Hard-link the newest checkpoint, which its program may delete, and copy the logs.

    Return its step.
    """
    for _ in range(MAX_ATTEMPTS):
        shutil.rmtree(copy, ignore_errors=True)
        with suppress(
            FileNotFoundError, StopIteration, shutil.Error
        ):  # the last: copytree missed a deleted file
            step = newest_step(directory / "checkpoints")
            assert step is not None
            steps = (directory / "checkpoints").glob("step-*")
            source = next(path for path in steps if path.name.endswith(f"{step}"))
            shutil.copytree(source, copy / "checkpoints" / source.name, copy_function=os.link)
            if not source.exists():  # renamed for its deletion: the copy may be a part of it
                continue
            for name in LOGS:
                if (directory / name).exists():
                    shutil.copyfile(directory / name, copy / name)
            return step
    raise OSError(f"no checkpoint in {directory} stayed long enough to be read")


def restore(run: TrackedRun, directory: Path) -> bool:
    """Download the uploaded checkpoint if it is newer than those of ``directory``.

    Return whether that succeeded.
    """
    digest, slot, step = run.known.get(DIGEST), run.known.get(SLOT), int(run.known.get(STEP, "-1"))
    newest = newest_step(directory / "checkpoints")
    if not digest or not slot or (newest is not None and newest >= step):
        return False
    folder = directory / "restored"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    is_complete = _download(run, _slot(int(slot)), folder, digest)
    if is_complete:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        # logs first: a checkpoint without its metrics and samples would lose them
        for name in LOGS:
            if (folder / name).exists():
                os.replace(folder / name, directory / name)
        os.replace(folder / "checkpoints", directory / "checkpoints")
    shutil.rmtree(folder, ignore_errors=True)
    return is_complete


def _download(run: TrackedRun, slot: str, folder: Path, digest: str) -> bool:
    """Download a slot's files into ``folder``; return whether all of them are there and intact."""
    files = json.loads((folder / FILES).read_text()) if _download_file(run, slot, FILES, folder) else {}
    return digest_of(files) == digest and all(
        _download_file(run, slot, name, folder) and file_digest(folder / name) == sha256
        for name, sha256 in files.items()
    )


def _download_file(run: TrackedRun, slot: str, name: str, folder: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = run.tracker.download(str(run.run_id), f"{slot}/{name}", Path(temporary))
        if file is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, folder / name)
    return file is not None


def discard(run: TrackedRun) -> None:
    """Delete both slots of a stage that has ended without an error."""
    for slot in (0, 1):
        with suppress(Exception):  # a slot that stays only takes space in MLflow
            run.tracker.delete(str(run.run_id), _slot(slot))


def _slot(slot: int) -> str:
    return f"checkpoint-{slot}"
