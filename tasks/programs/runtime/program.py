"""How every program starts and ends: ``main(train, Job)`` reads DIR/job.json, runs, and marks DIR/done last.

DIR/job.json        {"stage", "job": a *Job of config.py, "inputs": {name: path}, "machine": config.Machine}
DIR/metrics.jsonl   one JSON line per step: {"step", "total", "time", metrics...}; of long work between the steps {"step", "total", "time", "phase"}
DIR/checkpoints/    what a killed program resumes from
DIR/artifact/       the result; artifact/summary.json {"metrics": {name: number or {"value", "low", "high", "n"}}, "warnings": [sentences], ...}
DIR/error.json      {"input": bool, "disk": bool, "message"} when it ends with status 2 (the user's to mend) or 1

Where torchrun starts several processes on one folder, all of them run the program and the first one writes; error.json is by the first that failed.
torchrun itself always ends with status 1 then.
"""

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from tasks.config.jobs import Job
from tasks.config.machine import Machine
from tasks.system import torchrun
from tasks.system.errors import DiskFailure, InputError, disk_failure
from tasks.system.files import replacing

JobT = TypeVar("JobT", bound=Job)
PHASE_SECONDS = 1.0

ReportProgress = Callable[[int, int], None]  # called with what is done and the total


class Run:
    """One execution of a program in its folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        record = json.loads((directory / "job.json").read_text())
        self.record: dict[str, Any] = record["job"]
        self.inputs = {name: Path(path) for name, path in record["inputs"].items()}
        self.machine = Machine.model_validate(record.get("machine", {}))
        self.artifact = directory / "artifact"
        self.checkpoints = directory / "checkpoints"
        self.warnings: list[str] = []
        self.artifact.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def log(self, step: int, total: int, **metrics: float) -> None:
        """Append one step's metrics; ``total`` is the number of steps the program will take. Raises InputError if one is not finite."""
        _check_numbers(metrics, f" in step {step}")
        self._append({"step": step, "total": total, "time": round(time.time(), 3), **metrics})

    def log_bytes(self, read: int, size: int, **counts: float) -> None:
        """Append how many bytes of all have been read, for a program that has no steps."""
        self._append({"step": read, "total": size, "time": round(time.time(), 3), "unit": "bytes", **counts})

    def phase(self, name: str) -> Callable[[int, int], None]:
        """Return a function that tells how much is done of work that takes no steps, such as tokenising.

        It is called with a count and its total as often as the caller likes and writes a line every ``PHASE_SECONDS``, so a short phase writes none.
        """
        last = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= PHASE_SECONDS:
                last = now
                self._append({"step": done, "total": total, "time": round(time.time(), 3), "phase": name})

        return tell

    def _append(self, line: dict[str, Any]) -> None:
        if not torchrun.is_first():
            return
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def last(self) -> dict[str, Any]:
        """The newest logged step."""
        return self._lines()[-1]

    def mean(self, name: str) -> float:
        """Mean of a metric over all logged steps."""
        values = [line[name] for line in self._lines()]
        return float(sum(values) / len(values))

    def warn(self, sentence: str) -> None:
        """Something that makes the result worth less than its user thinks: said on the screen and in the report, whenever the artifact is used."""
        self.warnings.append(sentence)

    def note(self, name: str, more: dict[str, Any]) -> None:
        """Add to a JSON file of the artifact."""
        if not torchrun.is_first():
            return
        path = self.artifact / name
        known = json.loads(path.read_text()) if path.exists() else {}
        _write(path, to_json(known | more, indent=1))

    def rewind(self, step: int) -> None:
        """Forget logged steps above ``step``: they are about to be taken again from its checkpoint."""
        if not torchrun.is_first():
            return
        kept = [line for line in self._lines() if line["step"] <= step]
        _write(self.directory / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    def finish(self, metrics: dict[str, Any], **more: Any) -> None:
        """Write the artifact's summary and its metrics without wall-clock times, so that equal work gives equal bytes.

        Raises InputError if a metric is not finite; a measurement that is undefined (a correlation with a constant) is left out.
        """
        _check_numbers(metrics, "")
        metrics = {
            name: value
            for name, value in metrics.items()
            if not (isinstance(value, dict) and is_undefined(value))
        }
        if not torchrun.is_first():
            return
        timeless = [{k: v for k, v in line.items() if k != "time"} for line in self._lines()]
        _write(
            self.artifact / "metrics.jsonl",
            "".join(json.dumps(line, allow_nan=False) + "\n" for line in timeless),
        )
        _write(
            self.artifact / "summary.json",
            to_json({"metrics": metrics, "warnings": self.warnings, **more}, indent=1, sort_keys=True),
        )

    def _lines(self) -> list[dict[str, Any]]:
        """The steps' lines, without those of phases."""
        path = self.directory / "metrics.jsonl"
        lines = []
        for text in path.read_text().splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the line a killed program was writing
                break
        return [line for line in lines if "phase" not in line]


def _check_numbers(metrics: dict[str, Any], when: str) -> None:
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}{when}: training has diverged; lower the learning_rate.")


def is_undefined(estimate: dict[str, Any]) -> bool:
    """Return whether an estimate {"value", "low", "high", "n"} has no value."""
    value = estimate.get("value")
    return isinstance(value, float) and not math.isfinite(value)


def to_json(value: Any, **how: Any) -> str:
    """Return a value as JSON, which has no NaN and no infinities: what is undefined, or has no bound, is null."""
    return json.dumps(_finite(value), allow_nan=False, **how) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    with replacing(path) as new:
        new.write_text(text)


def read_summary(artifact: Path) -> dict[str, Any]:
    """The summary.json of an artifact folder."""
    summary: dict[str, Any] = json.loads((artifact / "summary.json").read_text())
    return summary


@contextmanager
def alone() -> Iterator[None]:
    """How most programs run: as one process."""
    if torchrun.world() > 1:
        raise InputError(
            f"This program is one process, and {torchrun.world()} were started on its folder: start it without torchrun."
        )
    yield


def main(
    train: Callable[[JobT, Run], None],
    job_type: type[JobT],
    *,
    among: Callable[[], AbstractContextManager[None]] = alone,
) -> None:
    """Run ``train`` on the folder named on the command line and exit: 0 done, 2 the user's to mend, 1 anything else.

    Inside ``among()`` the process is one of as many as were started.
    """
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: python -m tasks.programs.STAGE DIR\n\n{(train.__doc__ or '').strip()}\n{__doc__}")
        raise SystemExit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    directory = Path(sys.argv[1])
    if not (directory / "job.json").is_file():
        print(
            f"{directory} has no job.json: `alignflow job PROFILE STAGE {directory}` writes one",
            file=sys.stderr,
        )
        raise SystemExit(2)
    if torchrun.is_first():
        for name in ("done", "error.json"):
            (directory / name).unlink(missing_ok=True)
    try:
        with among():
            run = Run(directory)
            train(job_type.model_validate(run.record), run)
        if torchrun.is_first():
            (directory / "done").write_text("")
    except Exception as error:
        status = _record(error, directory)
        _print_last_words(disk_failure(error, directory))
        raise SystemExit(status) from None
    if (
        torchrun.world() > 1
    ):  # a C++ thread was seen to abort an interpreter that ended by itself, with all written
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _print_last_words(failure: DiskFailure | None) -> None:
    """Print the current exception. If the log is on a full disk, drop its output: failing to flush it would change the exit status."""
    with suppress(OSError):
        traceback.print_exc()
        if failure:
            print(failure, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _record(error: Exception, directory: Path) -> int:
    if isinstance(error, torchrun.PeersLost):  # it has nothing to tell that the others have not told
        return 1
    error = disk_failure(error, directory) or error
    is_input = isinstance(error, InputError | ValidationError)
    record = {
        "input": is_input,
        "disk": isinstance(error, DiskFailure),
        "message": str(error) or type(error).__name__,
    }
    try:
        with (directory / "error.json").open("x") as file:
            file.write(json.dumps(record))
    except FileExistsError:  # another of several processes was first
        pass
    except OSError:  # the disk does not take even that; the launcher tests the disk itself
        (directory / "error.json").unlink(missing_ok=True)
    return 2 if is_input else 1
