"""A running stage's newest checkpoint, kept in MLflow so that another machine can go on from it.

Two slots of the stage's MLflow run take turns; tags say which one is whole, its digest and its step. A slot holds checkpoints/ and metrics.jsonl.
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
from tasks.tracking import client, program_log
from tasks.tracking.runs import Tracked

SLOT, DIGEST, STEP = "checkpoint.slot", "checkpoint.digest", "checkpoint.step"
METRICS, FILES = "metrics.jsonl", "files.json"
TRIES = 20  # at taking a checkpoint while its program writes the next one


@contextmanager
def mirroring(run: Tracked, directory: Path, seconds: float) -> Iterator[None]:
    """While the block runs, upload the newest checkpoint of the stage at work in ``directory`` every ``seconds``; never with 0."""
    if not seconds or not run.is_on:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_keep_uploading, args=(run, directory, seconds, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(client.PATIENCE_TO_CONNECT)


def _keep_uploading(run: Tracked, directory: Path, seconds: float, ended: threading.Event) -> None:
    slot, last = int(run.known.get(SLOT, "1")), int(run.known.get(STEP, "-1"))
    while not ended.wait(seconds):
        step = newest_step(directory / "checkpoints")
        if step is None or step <= last:
            continue
        try:
            slot = 1 - slot
            upload(run, directory, slot)
            last = step
        except Exception as error:  # an outage: the next one will do; the stage itself goes on
            events.tell(
                "warning",
                text=f"A checkpoint could not be uploaded: {(str(error) or type(error).__name__).splitlines()[0][:200]}",
            )


def newest_step(checkpoints: Path) -> int | None:
    """Step of the newest checkpoint; None where there is none."""
    steps = [
        int(match[1])
        for path in checkpoints.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    ]
    return max(steps, default=None)


def upload(run: Tracked, directory: Path, slot: int) -> None:
    """Put the newest checkpoint of ``directory`` into a slot and, once it is whole there, say so."""
    taken = directory / "mirror"
    step = _take(directory, taken)
    files = {
        path.relative_to(taken).as_posix(): file_digest(path)
        for path in sorted(taken.rglob("*"))
        if path.is_file()
    }
    (taken / FILES).write_text(json.dumps(files))
    client.upload(str(run.run_id), taken, _slot(slot))
    client.set_tags(str(run.run_id), {SLOT: str(slot), DIGEST: digest_of(files), STEP: str(step)})
    if (log := directory / "log.txt").is_file():  # of a machine that is lost, nothing else will tell
        program_log.write_clean(log, taken / "log.txt")
        client.upload(str(run.run_id), taken / "log.txt", None)
    shutil.rmtree(taken)


def _take(directory: Path, taken: Path) -> int:
    """Hard links to the newest checkpoint, which its program may delete at any time, and the metrics up to it; gives its step."""
    for _ in range(TRIES):
        shutil.rmtree(taken, ignore_errors=True)
        with suppress(FileNotFoundError, StopIteration, shutil.Error):  # the last: copytree found a file gone
            step = newest_step(directory / "checkpoints")
            assert step is not None
            source = next(
                path for path in (directory / "checkpoints").glob("step-*") if path.name.endswith(f"{step}")
            )
            shutil.copytree(source, taken / "checkpoints" / source.name, copy_function=os.link)
            shutil.copyfile(directory / METRICS, taken / METRICS)
            return step
    raise OSError(f"no checkpoint in {directory} stayed long enough to be read")


def restore(run: Tracked, directory: Path) -> bool:
    """Bring a checkpoint that another machine uploaded, if it is newer than what ``directory`` has; False where there is none, or it is damaged."""
    digest, slot, step = run.known.get(DIGEST), run.known.get(SLOT), int(run.known.get(STEP, "-1"))
    here = newest_step(directory / "checkpoints")
    if not digest or not slot or (here is not None and here >= step):
        return False
    fetched = directory / "restored"
    shutil.rmtree(fetched, ignore_errors=True)
    fetched.mkdir(parents=True)
    root = _slot(int(slot))
    files = json.loads((fetched / FILES).read_text()) if _fetch(run, root, FILES, fetched) else {}
    whole = digest_of(files) == digest and all(
        _fetch(run, root, name, fetched) and file_digest(fetched / name) == sha256
        for name, sha256 in files.items()
    )
    if whole:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        os.replace(
            fetched / METRICS, directory / METRICS
        )  # first: a checkpoint without its metrics would lose them
        os.replace(fetched / "checkpoints", directory / "checkpoints")
    shutil.rmtree(fetched, ignore_errors=True)
    return whole


def _fetch(run: Tracked, root: str, name: str, folder: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file = client.download(str(run.run_id), f"{root}/{name}", Path(temporary))
        if file is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, folder / name)
    return file is not None


def discard(run: Tracked) -> None:
    """Remove the slots of a stage that has ended well."""
    for slot in (0, 1):
        with suppress(Exception):  # what is left only takes room in MLflow
            client.delete(str(run.run_id), _slot(slot))


def _slot(slot: int) -> str:
    return f"checkpoint-{slot}"
