"""Run a program in its folder.

``main(train, Job)`` reads DIR/job.json, calls ``train``, and writes DIR/done last.

DIR/started         empty: a process has got as far as ``main``
DIR/job.json        {"stage", "job": a Job of tasks.config.jobs, "inputs": {name: path},
                    "machine": a Machine of tasks.config}
DIR/metrics.jsonl   one JSON line per step: {"step", "total", "time", metrics...};
                    during long work between steps {"step", "total", "time", "phase"}
DIR/samples.jsonl   one JSON line per sample of a policy that trains: {"step", "answers": [{...}]}
DIR/checkpoints/    a killed program resumes from these
DIR/artifact/       the result, with summary.json:
                    {"metrics": {name: number or {"value", "low", "high", "n"}},
                    "warnings": [sentences], ...}
DIR/error.json      {"input": bool, "disk": bool, "message"}: an input error, which the user can fix, ends
                    with status 2, any other with 1

If torchrun starts several processes on one folder, all of them run the program and the first rank writes. The
first process that fails writes error.json; torchrun itself then always ends with status 1.
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
from tasks.system.interruptions import Interruptions

JobT = TypeVar("JobT", bound=Job)
PHASE_SECONDS = 1.0

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"

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
        self.interruptions = Interruptions(self.machine.time_limit)
        self.artifact.mkdir(exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)

    def log(self, step: int, total: int, **metrics: float) -> None:
        """Append a step's metrics; ``total`` is the number of steps that the program takes.

        Raises InputError if one is not finite.
        """
        _check_numbers(metrics, f" in step {step}")
        self._append({"step": step, "total": total, "time": round(time.time(), 3), **metrics})

    def log_bytes(self, read: int, size: int, **counts: float) -> None:
        """Append the number of bytes read, for a program without steps."""
        self._append({"step": read, "total": size, "time": round(time.time(), 3), "unit": "bytes", **counts})

    def phase(self, name: str) -> ReportProgress:
        """Return a function that reports progress of work between steps, such as tokenising.

        It takes what is done and the total, and writes a line at most every ``PHASE_SECONDS``: a short phase
        writes none.
        """
        last = time.monotonic()

        def report_progress(done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= PHASE_SECONDS:
                last = now
                self.log_phase(name, done, total)

        return report_progress

    def log_phase(self, name: str, done: int, total: int = 0) -> None:
        """Append what is done of work between steps; 0: the total is not known."""
        self._append({"step": done, "total": total, "time": round(time.time(), 3), "phase": name})

    def _append(self, line: dict[str, Any], name: str = METRICS) -> None:
        if not torchrun.is_first():
            return
        with (self.directory / name).open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def record_sample(self, step: int, answers: list[dict[str, Any]]) -> None:
        """Append the answers that a policy gave after ``step`` steps."""
        self._append({"step": step, "answers": _finite(answers)}, SAMPLES)

    def sampled_steps(self) -> set[int]:
        """Return the steps after which answers were recorded."""
        return {line["step"] for line in self._lines(SAMPLES)}

    def last(self) -> dict[str, Any]:
        """Return the last logged step."""
        return self._lines()[-1]

    def mean(self, name: str) -> float:
        """Return the mean of a metric over all logged steps."""
        values = [line[name] for line in self._lines()]
        return float(sum(values) / len(values))

    def warn(self, sentence: str) -> None:
        """Add a warning to the summary: it is printed, and shown in the report, whenever the artifact is
        used.
        """
        self.warnings.append(sentence)

    def note(self, name: str, more: dict[str, Any]) -> None:
        """Update a JSON file of the artifact."""
        if not torchrun.is_first():
            return
        path = self.artifact / name
        known = json.loads(path.read_text()) if path.exists() else {}
        _write(path, to_json(known | more, indent=1))

    def rewind(self, step: int) -> None:
        """Delete logged steps and samples above ``step``: they are taken again from its checkpoint."""
        if not torchrun.is_first():
            return
        for name in (METRICS, SAMPLES):
            kept = [line for line in self._lines(name) if line["step"] <= step]
            if name == METRICS or (self.directory / name).exists():
                _write(self.directory / name, "".join(json.dumps(line) + "\n" for line in kept))

    def finish(self, metrics: dict[str, Any], **more: Any) -> None:
        """Write the artifact's summary, and its metrics without wall-clock times, so that equal jobs write
        equal bytes.

        Raises InputError if a metric is not finite; an undefined estimate (a correlation with a constant) is
        left out.
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
            self.artifact / METRICS,
            "".join(json.dumps(line, allow_nan=False) + "\n" for line in timeless),
        )
        if (samples := self.directory / SAMPLES).exists():
            _write(self.artifact / SAMPLES, samples.read_text())
        _write(
            self.artifact / "summary.json",
            to_json({"metrics": metrics, "warnings": self.warnings, **more}, indent=1, sort_keys=True),
        )

    def _lines(self, name: str = METRICS) -> list[dict[str, Any]]:
        """Return the lines of steps, without those of phases."""
        path = self.directory / name
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
    """Return a value as JSON. NaN and infinities, which JSON lacks, become null."""
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
    """Return the summary.json of an artifact folder."""
    summary: dict[str, Any] = json.loads((artifact / "summary.json").read_text())
    return summary


@contextmanager
def alone() -> Iterator[None]:
    """Refuse to run as one of several processes. Raises InputError."""
    if torchrun.world() > 1:
        raise InputError(
            f"This program is one process, and {torchrun.world()} were started on its folder: start it "
            "without torchrun."
        )
    yield


def main(
    train: Callable[[JobT, Run], None],
    job_type: type[JobT],
    *,
    among: Callable[[], AbstractContextManager[None]] = alone,
) -> None:
    """Run ``train`` on the folder named on the command line.

    Exit with 0 if done, 2 for errors that the user can fix, 1 for others.

    ``among`` is the context that joins the processes that torchrun started.
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
        (directory / "started").touch()
        with among():
            run = Run(directory)
            with run.interruptions.listening():
                train(job_type.model_validate(run.record), run)
        if torchrun.is_first():
            (directory / "done").write_text("")
    except Exception as error:
        status = _write_error(error, directory)
        _print_traceback(disk_failure(error, directory))
        raise SystemExit(status) from None
    if torchrun.world() > 1:  # torch's C++ threads can abort an interpreter that exits normally
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _print_traceback(failure: DiskFailure | None) -> None:
    """Print the current exception.

    If the log is on a full disk, drop its output: failing to flush it would change the exit status.
    """
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


def _write_error(error: Exception, directory: Path) -> int:
    if isinstance(error, torchrun.PeersLost):  # the rank that failed first records its error
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
    except FileExistsError:  # another process was first
        pass
    except OSError:  # the disk is full; the launcher tests the disk itself
        (directory / "error.json").unlink(missing_ok=True)
    return 2 if is_input else 1
